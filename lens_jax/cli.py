"""`lens-jax`: prepare a data set, train, plot, sample, evaluate, measure, and look into checkpoints.

Each command is a typed function or dataclass that tyro turns into flags; a module is imported when its command runs, so
`--help` does not wait for JAX.
"""

import contextlib
import dataclasses
import difflib
import functools
import importlib
import io
import os
import re
import sys
import typing
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from lens_jax import environment, usage
from lens_jax.errors import LensError, LensWarning, nearest


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `lens-jax`; exits with 2 and one line on bad input."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage.ALL, end="")
        return
    if argv[0] == "--version":
        from lens_jax import __version__

        print(f"lens-jax {__version__}")
        return
    try:
        if argv[0] not in COMMANDS:
            raise LensError(f"no command {argv[0]!r}{nearest(argv[0], COMMANDS)}; accepted: {', '.join(COMMANDS)}")
        with warnings.catch_warnings():
            warnings.showwarning = functools.partial(_show_warning, warnings.showwarning)
            if environment.drop_x64():
                warnings.warn("JAX_ENABLE_X64 is ignored: it would change what is computed", LensWarning, stacklevel=1)
            code = COMMANDS[argv[0]](argv[1:])
    except LensError as error:
        print(f"lens-jax: error: {error}", file=sys.stderr)
        code = 2
    except (RuntimeError, AssertionError) as error:
        explained = environment.explain_backend(error)
        if explained is None:
            raise
        print(f"lens-jax: error: {explained}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("lens-jax: interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        # The reader of our output (head, less) has gone; Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code or 0)


def _show_warning(otherwise: Callable, message, category, *where, **options) -> None:
    """Ours in one line without the place in the code; those of other packages as they are."""
    if issubclass(category, LensWarning):
        print(f"lens-jax: warning: {message}", file=sys.stderr)
    else:
        otherwise(message, category, *where, **options)


def prepare(argv: list[str]) -> None:
    from lens_jax.data.prepare import FolderConfig, prepare_folder
    from lens_jax.data.prepare_curated import CuratedConfig, prepare_curated
    from lens_jax.data.prepare_scenes import OpenMojiConfig, prepare_openmoji

    def folder(config: FolderConfig) -> None:
        # Of damaged metadata and large images: what is left out for it is named, and a line each would hide the rest.
        warnings.filterwarnings("ignore", module="PIL")
        if not config.tokenizer:
            prepare_folder(config)
            return
        from lens_jax.encoders.tokenizer import HarmonyTokenizer

        tokenizer = HarmonyTokenizer.from_folder(config.tokenizer)
        prepare_folder(config, count_tokens=lambda text: len(tokenizer.encode(text)))

    kinds: dict[str, tuple[type, Callable]] = {
        "openmoji": (OpenMojiConfig, prepare_openmoji),
        "folder": (FolderConfig, folder),
        "curated": (CuratedConfig, prepare_curated),
    }
    usage = (
        "usage: lens-jax prepare openmoji|folder|curated [OPTIONS]\n\n"
        "  openmoji   pictograms composed into captioned scenes (needs the extra: demo)\n"
        "  folder     images with captions in text files beside them, or a metadata.jsonl, .csv or .parquet\n"
        "  curated    the best images of a prepared data set, as many of each kind, without a copy of them\n\n"
        "Each answers --help."
    )
    _choose(argv, "prepare", "source", kinds, usage)


def data(argv: list[str]) -> None:
    from lens_jax import config as config_files
    from lens_jax.data.engine.extra import needed

    needed("pyarrow")  # for every command, and its own help
    from lens_jax.data.engine import command
    from lens_jax.data.engine.config import EngineConfig

    if not argv or argv[0] in ("-h", "--help"):
        print(command.USAGE, end="")
        return
    name, *rest = argv
    kind, run = command.action(name)
    if name == "remove":
        run(parse(kind, rest, "lens-jax data remove"))
        return
    _config_comes_first(rest, f"data {name}")
    base = config_files.expand_home(config_files.load(rest[0], EngineConfig))
    flags, beam = command.split(rest[1:]) if name == "run" else (rest[1:], ())
    run(command.with_beam(parse(kind, flags, f"lens-jax data {name} {rest[0]}", command.with_config(kind, base)), beam))


def train(argv: list[str]) -> int:
    from lens_jax.pretraining.config import TrainConfig

    config = _config_of_run(argv, "train", TrainConfig, usage.TRAIN)
    if config is None:
        return 0

    def run():
        from lens_jax.planning.fit import choose_remat_here
        from lens_jax.pretraining.job import train

        return train(choose_remat_here(config))

    return _run_to_its_end(config, run)


def rl(argv: list[str]) -> int:
    from lens_jax.posttraining.rl_config import RlConfig

    config = _config_of_run(argv, "rl", RlConfig, usage.RL)
    if config is None:
        return 0

    def run():
        from lens_jax.planning.fit import choose_remat_here
        from lens_jax.planning.rl import choose_remat
        from lens_jax.posttraining.rl_job import train

        return train(choose_remat_here(config, choose_remat))

    return _run_to_its_end(config, run)


def distill(argv: list[str]) -> int:
    from lens_jax.posttraining.distill_config import DistillConfig

    config = _config_of_run(argv, "distill", DistillConfig, usage.DISTILL)
    if config is None:
        return 0

    def run():
        from lens_jax.planning.distill import choose_remat
        from lens_jax.planning.fit import choose_remat_here
        from lens_jax.posttraining.distill_job import train

        return train(choose_remat_here(config, choose_remat))

    return _run_to_its_end(config, run)


def _config_of_run(argv: list[str], command: str, kind: type, text: str) -> Any | None:
    """The config that comes first, with the options behind it; None where help was asked for, and is printed."""
    from lens_jax import config as config_files

    if not argv or argv[0] in ("-h", "--help"):
        names = config_files.available()
        of_others = tuple(f"{other}_" for other in ("rl", "distill", "data"))
        mine = [name for name in names if name.startswith(f"{command}_")]
        print(text.format(configs=", ".join(mine or (name for name in names if not name.startswith(of_others)))))
        return None
    _config_comes_first(argv, command)
    return parse(kind, argv[1:], f"lens-jax {command} {argv[0]}", default=config_files.load(argv[0], kind))


def _config_comes_first(argv: list[str], command: str) -> None:
    if not argv or argv[0].startswith("-"):
        raise LensError(f"the config comes first: lens-jax {command} CONFIG {' '.join([*argv[:1], '...'])}")


def _run_to_its_end(config: Any, run: Callable[[], Any]) -> int:
    """The exit code of a run of one process or of many; JAX is set up before `run` imports what uses it."""
    from lens_jax.parallel import processes as distributed

    if config.deterministic:
        from lens_jax.pretraining import determinism

        determinism.set_flag()
    distributed.initialize(heartbeat=config.heartbeat_seconds)
    with distributed.ending_alone():
        stopped_by = run().stopped_by
    # As a shell reports it: an orchestrator must not take a run that was stopped for one that is complete.
    return 0 if stopped_by is None else 128 + stopped_by


def precompute(argv: list[str]) -> None:
    import tyro

    from lens_jax import config as config_files
    from lens_jax.pretraining.config import TrainConfig

    if not argv or argv[0] in ("-h", "--help"):
        print(
            "usage: lens-jax precompute CONFIG --out DIR [OPTIONS]\n\n"
            "CONFIG as for train: its data set, codec and text encoder are taken. Then train on DIR:\n"
            "  lens-jax train CONFIG --data.path DIR\n\n"
            "Stopped, the same command goes on. lens-jax precompute finetune --help lists the options."
        )
        return
    _config_comes_first(argv, "precompute")
    base = config_files.load(argv[0], TrainConfig)
    from lens_jax.pretraining import precompute as module

    default = module.Precompute(tyro.MISSING, base.data, base.codec, base.text)
    module.precompute(parse(module.Precompute, argv[1:], f"lens-jax precompute {argv[0]}", default=default))


def plan(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(
            "usage: lens-jax plan CONFIG [--hardware h100] [--devices 8] [OPTIONS]\n"
            "       lens-jax plan --report [--json FILE]\n\n"
            "CONFIG is as for lens-jax train, rl or distill, and every field of it is an option here too; nothing is\n"
            "allocated.\n"
            "--report derives the compute figures of the report.\n\n"
            "lens-jax plan CONFIG --help lists the options."
        )
        return
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before JAX starts: a plan must not take a device that trains
    if argv[0] == "--report":
        from lens_jax.planning import figures

        figures.report(parse(figures.ReportConfig, argv[1:], "lens-jax plan --report"))
        return
    _config_comes_first(argv, "plan")
    from lens_jax import config as config_files
    from lens_jax.planning import command, distill_command, rl_command
    from lens_jax.posttraining.distill_config import DistillConfig
    from lens_jax.posttraining.rl_config import RlConfig
    from lens_jax.pretraining.config import TrainConfig

    kinds: dict[type, tuple[type, Callable]] = {
        TrainConfig: (command.PlanConfig, command.plan),
        RlConfig: (rl_command.RlPlanConfig, rl_command.plan),
        DistillConfig: (distill_command.DistillPlanConfig, distill_command.plan),
    }
    config = config_files.load(argv[0], *kinds)
    kind, run = kinds[type(config)]
    run(parse(kind, argv[1:], f"lens-jax plan {argv[0]}", default=kind(config)))


def sample(argv: list[str]) -> None:
    from lens_jax.inference.command import SampleCommand, sample_to_folder

    sample_to_folder(parse(SampleCommand, argv, "lens-jax sample"))


def rewrite(argv: list[str]) -> None:
    from lens_jax.inference import rewrite_command as module

    module.rewrite(parse(module.RewriteCommand, argv, "lens-jax rewrite"))


def prompts(argv: list[str]) -> None:
    from lens_jax.posttraining.prompts.check import CheckPrompts, SubsetPrompts, check_prompts, subset_prompts
    from lens_jax.posttraining.prompts.make import MakePrompts, make_prompts
    from lens_jax.posttraining.prompts.scenes import ScenePrompts, make_scene_prompts

    kinds: dict[str, tuple[type, Callable]] = {
        "make": (MakePrompts, make_prompts),
        "scenes": (ScenePrompts, make_scene_prompts),
        "check": (CheckPrompts, check_prompts),
        "subset": (SubsetPrompts, subset_prompts),
    }
    usage = (
        "usage: lens-jax prompts make|scenes|check|subset [OPTIONS]\n\n"
        "  make             write prompts and their rubrics by a language model, about the items of a taxonomy\n"
        "  scenes           make prompts of the pictogram world, which an exact checker can judge, without any model\n"
        "  check PATH       say what a set holds, and what in it looks wrong\n"
        "  subset SRC OUT   write the same part of a set each time: a share of it, or all but a category\n\n"
        "Each answers --help."
    )
    _choose(argv, "prompts", "action", kinds, usage)


def plot(argv: list[str]) -> None:
    from lens_jax.plot import PlotConfig
    from lens_jax.plot import plot as run

    run(parse(PlotConfig, argv, "lens-jax plot"))


def convert(argv: list[str]) -> None:
    from lens_jax.convert import command

    kinds = {
        "to-jax": (command.ToJax, command.to_jax),
        "to-torch": (command.ToTorch, command.to_torch),
        "pack": (command.Pack, command.pack),
    }
    usage = (
        "usage: lens-jax convert to-jax|to-torch|pack SRC DST [OPTIONS]\n\n"
        "  to-jax     a release folder (transformer/, vae/, text_encoder/) or single files to our layout\n"
        "  to-torch   our layout, or a training run, to a release folder\n"
        "  pack       a training run to one file to draw from\n\n"
        "Each answers --help."
    )
    _choose(argv, "convert", "direction", kinds, usage)


def evaluate(argv: list[str]) -> None:
    from lens_jax.evaluation import compare, concepts, scene_bench
    from lens_jax.evaluation.config import EvaluateConfig

    config = parse(EvaluateConfig, argv, "lens-jax evaluate")
    (compare if config.compare else scene_bench if config.bench == "scenes" else concepts).run(config)


def claims(argv: list[str]) -> None:
    from lens_jax.evaluation import claims as module

    module.claims(parse(module.ClaimsConfig, argv, "lens-jax claims"))


def bench(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(usage.BENCH, end="")
        return
    kinds = (
        "suite", "train", "data", "engine", "clean", "filters", "dedup", "copies", "captions", "synthetic", "languages",
        "sample", "student", "denoiser", "attention", "text", "decode", "convert",
    )  # fmt: skip
    if argv[0] not in kinds:
        raise LensError(f"no benchmark {argv[0]!r}{nearest(argv[0], kinds)}; accepted: {', '.join(kinds)}")
    module = importlib.import_module(f"lens_jax.bench.{'suite.command' if argv[0] == 'suite' else argv[0]}")
    options = parse(getattr(module, f"{argv[0].title()}Bench"), argv[1:], f"lens-jax bench {argv[0]}")
    getattr(module, f"bench_{argv[0]}")(options)


def info(argv: list[str]) -> None:
    paths = [word for word in argv if word != "--check"]
    if len(paths) != 1 or paths[0] in ("-h", "--help"):
        print(
            "usage: lens-jax info PATH [--check]\n\n"
            "PATH is a run, a checkpoint, a packed run, a release folder, a prepared data set, or small.\n"
            "--check looks at each shard of a data set: whether it is there, and how long it is."
        )
        if len(paths) != 1:
            raise LensError(f"info takes one path, got {len(paths)}")
        return
    from lens_jax.info import describe

    describe(os.path.expanduser(paths[0]), check=len(argv) > 1)


def _choose(argv: list[str], command: str, what: str, kinds: dict[str, tuple[type, Callable]], usage: str) -> None:
    """Run the kind of `command` that comes first in argv, with the rest as its flags."""
    if not argv or argv[0] in ("-h", "--help"):
        print(usage)
        return
    if argv[0] not in kinds:
        raise LensError(f"no {what} {argv[0]!r}{nearest(argv[0], kinds)}; accepted: {', '.join(kinds)}")
    cls, run = kinds[argv[0]]
    run(parse(cls, argv[1:], f"lens-jax {command} {argv[0]}"))


COMMANDS: dict[str, Callable[[list[str]], Any]] = {
    "prepare": prepare,
    "data": data,
    "precompute": precompute,
    "train": train,
    "rl": rl,
    "distill": distill,
    "plan": plan,
    "sample": sample,
    "rewrite": rewrite,
    "prompts": prompts,
    "plot": plot,
    "convert": convert,
    "evaluate": evaluate,
    "claims": claims,
    "bench": bench,
    "info": info,
}


def parse(cls: type, argv: list[str], program: str, default: Any = None) -> Any:
    """A dataclass from flags. tyro answers --help; its errors become one line that keeps its suggestions."""
    import tyro

    from lens_jax import config as config_files

    captured = io.StringIO()
    options = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(captured):
            parsed = tyro.cli(cls, args=argv, prog=program, config=(tyro.conf.AvoidSubcommands,), **options)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise LensError(_one_line(captured.getvalue(), program, _flags(cls))) from None
    config_files.check_numbers(parsed)
    return config_files.expand_home(parsed)


def _flags(cls: type, prefix: str = "--") -> list[str]:
    """Every flag of a dataclass, nested ones dotted."""
    flags = []
    for name, hint in typing.get_type_hints(cls).items():
        flag = prefix + name.replace("_", "-")
        nested = [kind for kind in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(kind)]
        flags += [leaf for kind in nested for leaf in _flags(kind, f"{flag}.")] if nested else [flag]
    return flags


def _one_line(box: str, program: str, known: list[str]) -> str:
    """tyro draws a box with rules between the message and the flags it suggests, and where the terminal is not UTF-8
    without a frame and with the title as one more section."""
    sections = [[]]
    for line in box.splitlines():
        line = line.strip("│ ")
        if len(line) > 8 and set(line) <= set("─-"):
            sections.append([])
        elif line and not line.startswith(("╭", "╰")):
            sections[-1].append(line)
    message, *rest = sections if box.startswith("╭") else sections[1:]
    suggestion = ""
    unknown = re.search(r"Unrecognized options: (--\S+?)(,|$)", message[0])
    if unknown:
        near = [line.split()[0].rstrip(",") for section in rest for line in section if line.startswith("--")]
        # tyro compares whole flags; most typos leave out the part before the dot.
        leaf = {flag.rpartition(".")[2].lstrip("-"): flag for flag in known}
        wanted = unknown[1].rpartition(".")[2].lstrip("-").replace("_", "-")
        near = near or [leaf[name] for name in difflib.get_close_matches(wanted, leaf, n=2)]
        suggestion = f" (did you mean {' or '.join(near[:3])}?)" if near else ""
    return f"{' '.join(message)}{suggestion}; see {program} --help"
