// Draws the figures, in the colours of the page: light or dark as the reader's system asks, light on paper.
const PRINT_WIDTH = 690;
const CONFIG = {
  displaylogo: false,
  responsive: true,
  // Plotly's default bar has a button that sends a chart elsewhere; this one has not.
  modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
};
const plots = [...document.querySelectorAll("figure.plot")].map((figure) => ({
  canvas: figure.querySelector(".canvas"),
  ...JSON.parse(figure.querySelector("script").textContent),
}));

function theme(layout) {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(`--${name}`).trim();
  const themed = {
    paper_bgcolor: "rgba(0, 0, 0, 0)",
    plot_bgcolor: "rgba(0, 0, 0, 0)",
    "font.color": colour("ink"),
    "font.family": colour("sans"),
    "font.size": 12.5,
    "hoverlabel.bgcolor": colour("paper"),
    "hoverlabel.bordercolor": colour("rule"),
    "hoverlabel.font.color": colour("ink"),
    "modebar.bgcolor": "rgba(0, 0, 0, 0)",
    "modebar.color": colour("rule"),
    "modebar.activecolor": colour("muted"),
  };
  for (const axis of Object.keys(layout).filter((key) => /^[xy]axis\d*$/.test(key))) {
    themed[`${axis}.gridcolor`] = colour("grid");
    themed[`${axis}.linecolor`] = colour("rule");
    themed[`${axis}.zerolinecolor`] = colour("zero");
  }
  return themed;
}

async function recolour(changes = {}) {
  await Promise.all(plots.map(({ canvas, layout }) => Plotly.relayout(canvas, { ...theme(layout), ...changes })));
}

async function draw() {
  for (const { canvas, data, layout } of plots) {
    await Plotly.newPlot(canvas, data, layout, CONFIG);
  }
  await recolour();
  document.documentElement.dataset.figures = String(plots.length);
}

// A figure in a closed fold was drawn without knowing its width.
for (const fold of document.querySelectorAll("details")) {
  fold.addEventListener("toggle", () => {
    for (const { canvas } of plots) {
      if (fold.open && fold.contains(canvas)) Plotly.Plots.resize(canvas);
    }
  });
}

draw();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => recolour());
addEventListener("beforeprint", () => {
  document.documentElement.classList.add("printing");
  for (const fold of document.querySelectorAll("details.fold")) fold.open = true;
  recolour({ autosize: false, width: PRINT_WIDTH });
});
addEventListener("afterprint", () => {
  document.documentElement.classList.remove("printing");
  recolour({ autosize: true, width: null });
});
