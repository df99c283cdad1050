"""The console script `dit`: look at parameters, roles and initialisations without training anything."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from dit import config, init, model
from dit.errors import ConfigError, UserError
from dit.init.strategy import claims

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)

ParamsFile = Annotated[Path, typer.Option("--params", help="The parameter file.")]
CLASSES_SHOWN = 1000
"""Classes of the published models, for a table that has no data set."""


@contextmanager
def _told() -> Iterator[None]:
    """Print a user's error as one message and exit with 2."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None


@app.command()
def check(params: ParamsFile = Path("params.yaml")) -> None:
    """Check a parameter file, and say what the study would do."""
    with _told():
        loaded = config.load(params)
        study = loaded.study
        print(
            f"{params} is valid: study '{study.name}', {len(study.strategies)} strategies x {len(study.seeds)} seeds, "
            f"{loaded.model.name} on latents of {loaded.autoencoder.latent_channels} x {loaded.latent_size} x "
            f"{loaded.latent_size}, {loaded.train.steps} steps of {loaded.train.batch_size}"
        )


@app.command("init")
def show_init(
    strategy: Annotated[str, typer.Option(help="A strategy of the parameter file.")],
    name: Annotated[str | None, typer.Option("--model", help="A network such as DiT-S/2. [default: the study's]")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    params: ParamsFile = Path("params.yaml"),
) -> None:
    """Show what a strategy does to every role of a network: its rule, and the values that it gives."""
    with _told():
        loaded = config.load(params)
        if strategy not in loaded.strategies:
            raise ConfigError(f"{params}: unknown strategy '{strategy}'; accepted: {', '.join(loaded.strategies)}")
        chosen = loaded.strategies[strategy]
        network = model.build(
            name or loaded.model.name,
            latent_size=loaded.latent_size,
            latent_channels=loaded.autoencoder.latent_channels,
            num_classes=CLASSES_SHOWN,
            learn_sigma=loaded.diffusion.learn_sigma,
        )
        init.apply(network, chosen, seed)
    table = Table(title=f"{strategy}: {chosen.description}", caption=chosen.source, title_justify="left")
    table.add_column("role", no_wrap=True)
    for column in ("shape", "rule"):
        table.add_column(column)
    for column in ("mean", "std", "zero"):
        table.add_column(column, justify="right")
    parameters = dict(network.named_parameters())
    for role, rule in claims(chosen, network.depth).items():
        values = parameters[role.parameter].detach()
        values = values[role.rows(len(values))]
        arguments = rule.model_dump(exclude={"role", "init"}, exclude_defaults=True)
        shown = " ".join([rule.init, *(f"{key}={value}" for key, value in arguments.items())])
        shape = " x ".join(map(str, values.shape))
        zero = (values == 0).float().mean()
        table.add_row(role.path, shape, shown, f"{values.mean():.4f}", f"{values.std(correction=0):.4f}", f"{zero:.0%}")
    Console(width=None if sys.stdout.isatty() else 160).print(table)


if __name__ == "__main__":
    app()
