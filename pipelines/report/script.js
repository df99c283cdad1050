// Draws the figures, in the colours of the page: light or dark as the reader's system asks, light on paper.
const PRINT_WIDTH = 690;
const NARROW = matchMedia("(max-width: 700px)");
const STACKED = { least: 200, gap: 116 };
const CONFIG = {
  displaylogo: false,
  displayModeBar: "hover",
  responsive: true,
  // Plotly's default bar has a button that sends a chart elsewhere; this one has not.
  modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
};
const plots = [...document.querySelectorAll("figure.plot")].map((figure) => ({
  figure,
  canvas: figure.querySelector(".canvas"),
  ...JSON.parse(figure.querySelector("script").textContent),
}));

// Plotly is in the page, compressed.
async function loadPlotly() {
  const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), (letter) => letter.charCodeAt(0));
  const script = document.createElement("script");
  script.textContent = await new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  document.head.append(script);
}

// On a narrow screen, panels that stand side by side are put below each other.
function arranged(original) {
  const layout = { ...structuredClone(original), showlegend: false };
  const panels = Object.keys(layout)
    .filter((key) => /^xaxis\d*$/.test(key))
    .sort((one, other) => (Number(one.slice(5)) || 1) - (Number(other.slice(5)) || 1))
    .map((key) => ({ x: layout[key], y: layout[`yaxis${key.slice(5)}`] }));
  if (!NARROW.matches || panels.length < 2) return layout;
  const { t, b } = layout.margin;
  const titles = (layout.annotations ?? []).filter((one) => one.yref === "paper" && one.yanchor === "bottom");
  const inner = layout.height - t - b;
  const heights = panels.map(({ y }) => Math.max(STACKED.least, (y.domain[1] - y.domain[0]) * inner));
  const total = heights.reduce((sum, height) => sum + height, STACKED.gap * (panels.length - 1));
  let top = total;
  panels.forEach(({ x, y }, index) => {
    x.domain = [0, 1];
    y.domain = [(top - heights[index]) / total, top / total];
    if (y.matches) y.showticklabels = true;
    if (titles.length === panels.length) Object.assign(titles[index], { x: 0.5, y: top / total });
    top -= heights[index] + STACKED.gap;
  });
  layout.height = total + t + b;
  return layout;
}

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
    "modebar.color": colour("muted"),
    "modebar.activecolor": colour("ink"),
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

async function arrange() {
  for (const { canvas, data, layout } of plots) {
    const fitting = arranged(layout);
    for (const [path, value] of Object.entries(theme(layout))) {
      const keys = path.split(".");
      const last = keys.pop();
      keys.reduce((part, key) => (part[key] ??= {}), fitting)[last] = value;
    }
    canvas.style.height = `${fitting.height}px`;
    await Plotly.react(canvas, data, fitting, CONFIG);
  }
}

// A click on an entry of a legend hides its lines, or shows them again.
function connectLegend({ figure, canvas, data }) {
  for (const button of figure.querySelectorAll(".legend button")) {
    button.addEventListener("click", () => {
      const shown = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(shown));
      const mine = data.flatMap((trace, index) => ((trace.legendgroup ?? trace.name) === button.dataset.group ? [index] : []));
      Plotly.restyle(canvas, { visible: shown }, mine);
    });
  }
}

// Where something is cut off at the side, the page says so.
function markOverflow() {
  for (const box of document.querySelectorAll(".scroll")) {
    box.classList.toggle("more", box.scrollWidth > box.clientWidth + 1);
  }
}

async function draw() {
  await loadPlotly();
  await arrange();
  plots.forEach(connectLegend);
  markOverflow();
  document.documentElement.dataset.figures = String(plots.length);
}

// A figure in a closed fold was drawn without knowing its width.
for (const fold of document.querySelectorAll("details")) {
  fold.addEventListener("toggle", () => {
    for (const { canvas } of plots) {
      if (fold.open && fold.contains(canvas)) Plotly.Plots.resize(canvas);
    }
    markOverflow();
  });
}

// A link to something in a fold opens the fold.
addEventListener("hashchange", () => document.getElementById(location.hash.slice(1))?.closest("details")?.setAttribute("open", ""));

draw();
addEventListener("resize", markOverflow);
NARROW.addEventListener("change", arrange);
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
