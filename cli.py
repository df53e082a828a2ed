"""The command line: the group, its error policy, and `demo`, which uses every room.

Each room's own commands are in its `commands.py`: arguments in, calls out, tables and JSON back.
"""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path

import click

from whisper_at_cli import __version__
from whisper_at_cli.extract import cache_commands
from whisper_at_cli.extract import commands as extract_commands
from whisper_at_cli.extract.completion import offer_values
from whisper_at_cli.extract.doctor import commands as doctor_commands
from whisper_at_cli.extract.errors import WhisperATError
from whisper_at_cli.extract.evaluation import commands as evaluation_commands
from whisper_at_cli.extract.options import command
from whisper_at_cli.extract.output import print_json, print_table
from whisper_at_cli.extract.progress import progress_on_stderr
from whisper_at_cli.heads import commands as heads_commands
from whisper_at_cli.heads import file_commands
from whisper_at_cli.heads.tagging import commands as tagging_commands
from whisper_at_cli.probe import commands as probe_commands
from whisper_at_cli.probe.report import commands as report_commands
from whisper_at_cli.probe.robustness import commands as robustness_commands

# Before torch is loaded: threads that wait for each other soon sleep. As they come, GNU's spin for long, and where
# other programs wanted the cores too, training a small head took 51 s instead of 13.5; on idle cores both took 6.6 s.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")


class _Commands(click.Group):
    """Lists commands in the order in which a user meets them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="whisper-at-cli")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
@click.pass_context
def cli(ctx: click.Context, debug: bool, quiet: bool) -> None:  # noqa: ARG001 - main looks for --debug by itself
    """Every layer of Whisper's frozen encoder, extracted once; probes and taggers trained from them many times.

    \b
        whisper-at-cli extract ESC-50 esc50.zarr --model tiny.en
        whisper-at-cli probe esc50.zarr --layer all
        whisper-at-cli train-head esc50.zarr --head tl-tr --dim 128 --out tagger

    Results go to stdout, progress and messages to stderr. Exit status: 0 done, 1 the work failed or part of it
    did, 2 wrong usage.
    """
    ctx.obj = {"quiet": quiet}


@command("demo")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("demo"), show_default=True, help="Where all of it goes."
)
@click.pass_context
def demo_command(ctx: click.Context, out: Path, as_json: bool) -> None:
    """The whole job on sounds that the project makes itself, with real tiny.en weights: two minutes on two cores.

    \b
        whisper-at-cli demo
    """
    from whisper_at_cli.extract import FeatureCache, extract
    from whisper_at_cli.extract.backbones.weights import demo_weights_folder
    from whisper_at_cli.extract.datasets.synthesis import synthesise
    from whisper_at_cli.heads import train_head
    from whisper_at_cli.probe import probe_layers
    from whisper_at_cli.probe.figures import draw_layer_accuracy

    quiet = ctx.obj["quiet"]
    sounds, cache, figure, head = out / "sounds", out / "sounds.zarr", out / "layers.png", out / "head"
    weights = demo_weights_folder()
    with progress_on_stderr("synthesise", "clips", quiet=quiet) as progress:
        synthesise(sounds, progress=progress)
    with progress_on_stderr("extract", "clips", quiet=quiet) as progress:
        extracted = extract(sounds, cache, model=weights, progress=progress)
    opened = FeatureCache.open(cache)
    with progress_on_stderr("probe", "layers", quiet=quiet) as progress:
        probed = probe_layers(opened, progress=progress)
    draw_layer_accuracy([(opened.spec.backbone, probed)], figure)
    with progress_on_stderr("train wa-tr", "epochs", quiet=quiet) as progress:
        trained = train_head(opened, head="wa-tr", out=head, restart=True, progress=progress)
    places = {"sounds": str(sounds), "cache": str(cache), "figure": str(figure), "checkpoint": str(head)}
    if as_json:
        print_json({"extract": asdict(extracted), "probe": asdict(probed), "head": asdict(trained), **places})
        return
    click.echo(f"\n{extracted.written + extracted.skipped} clips of {len(opened.spec.class_names)} classes, 5 folds\n")
    probe_commands.print_probe(probed)
    heads_commands.print_training(trained)
    print_table(list(places.items()), ("what", "where"))
    click.echo(
        "The same on your own sounds (a folder per class, or ESC-50's layout):\n"
        "    whisper-at-cli extract SOUNDS sounds.zarr --model tiny.en\n"
        "    whisper-at-cli probe sounds.zarr --layer all --figure layers.png\n"
        "    whisper-at-cli train-head sounds.zarr --head wa-tr --out head"
    )


COMMANDS_OF = (
    extract_commands,
    cache_commands,
    probe_commands,
    evaluation_commands,
    robustness_commands,
    report_commands,
    heads_commands,
    file_commands,
    tagging_commands,
    doctor_commands,
)
for each in (*(one for module in COMMANDS_OF for one in module.COMMANDS), demo_command):
    cli.add_command(each)
offer_values(cli)


def main(arguments: list[str] | None = None) -> None:
    """Entry point. The whole error policy: one line on stderr, and the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    arguments = ["--debug"] * debug + [argument for argument in arguments if argument != "--debug"]
    try:
        sys.exit(cli.main(arguments, prog_name="whisper-at-cli", standalone_mode=False) or 0)
    except WhisperATError as error:
        _fail(str(error), error.exit_status, debug)
    except click.UsageError as error:
        where = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
        _fail(f"{error.format_message()}{where}", 2, debug)
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted; what was finished is kept, and the same command continues", 1, debug)
    except BrokenPipeError:
        sys.exit(1)
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
        _fail(f"the system refused: {what}; check permissions, free space and the path", 1, debug)
    except ImportError as error:
        _fail(f"{error}; something is missing or broken, see what with: whisper-at-cli doctor", 1, debug)
    except Exception as error:  # noqa: BLE001 - the last resort of the error policy; --debug raises it
        _fail(
            f"{type(error).__name__}: {error}; this should not happen: run again with --debug for the traceback",
            1,
            debug,
        )


def _fail(message: str, status: int, debug: bool) -> None:
    if debug:
        raise  # noqa: PLE0704 - called from an except block only
    click.echo(f"error: {' '.join(message.split())}", err=True)
    sys.exit(status)


if __name__ == "__main__":
    main()
