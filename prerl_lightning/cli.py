"""The ``prerl`` command.

    prerl fit --config configs/dsrl.yaml
    prerl validate --config configs/dsrl.yaml --model.init_args.model runs/dsrl/version_0/model
    prerl fit --config configs/dsrl.yaml --ckpt_path last

``--help`` and ``--version`` are answered before anything heavy is imported.
"""

import faulthandler
import os
import sys
from argparse import ArgumentError
from collections.abc import Callable
from importlib import import_module
from signal import SIGPIPE
from typing import Any

from prerl_lightning import __version__
from prerl_lightning.errors import InputError, RunError, nearest, said_by_us
from prerl_lightning.signals import Interrupted, signals
from prerl_lightning.terminal import log_to_stdout, printable_lines, quiet, quiet_lightning
from prerl_lightning.watchdog import watchdog

USAGE = """usage: prerl {fit,validate,test} [--config FILE ...] [--KEY VALUE ...]
       prerl evaluate --model MODEL --data SET,... --k K
       prerl compare FOLDER FOLDER
       prerl report RUN [RUN ...] -o report.html
       prerl watch [RUN]
       prerl runs [FOLDER]
       prerl configs [NAME]
       prerl study STUDY.yaml [--dry_run]
       prerl doctor [--config FILE ...] [--model MODEL] [--json]
       prerl plan --config FILE ... [--gpu CARD] [--devices N] [--json]
       prerl convert CHECKPOINT OUT
       prerl export CHECKPOINT OUT
       prerl pretrain --config FILE --out FOLDER
       prerl job --config FILE --machine NAME
       prerl help [TOPIC]

Reinforcement learning with verifiable rewards in pre-train and post-train space, on Lightning and vLLM.

  fit        train, e.g.  prerl fit --config configs/dsrl.yaml
  validate   evaluate on the held-out set: avg@k, pass@k, greedy accuracy
  test       the same, logged as test/...
  evaluate   k samples a problem of named sets: avg@k, pass@k, maj@k with intervals, resumable; also of a server's model
  compare    two evaluations, problem by problem: differences, exact p, and what the set can show
  report     one HTML page on runs: curves, thoughts, alignment, samples; opens from disk, asks no network
  watch      a run's figures in the terminal, live, from another shell; default: the newest below runs/
  runs       the runs below runs/, a line each: objective, model, steps, accuracy, state
  configs    the configurations that come with the package; `prerl configs dsrl > mine.yaml` copies one
  study      arms x seeds of a YAML file, and a verdict for each of its claims; goes on where it was stopped
  doctor     does this machine run all this, and does that run fit? A self-test in under two minutes
  plan       memory, tokens, FLOPs and time of a run, before a machine is rented: from its config.json alone
  convert    a sharded checkpoint as one file, or one file as a folder of shards
  export     the weights of a checkpoint as a Hugging Face folder
  pretrain   a tiny model from scratch on a corpus of your own, such as the embedded one
  job        prerl fit on machines of Lightning AI, resumed by itself; --dry_run shows what would be sent
  help       what an objective, a key, a problem set, a reward or a metric is and takes: prerl help GRPO

  prerl help                  the topics; also a class of your own by its path
  prerl fit --print_config    the whole configuration as YAML
  --config may be given several times: later files and options win; `callbacks+:` appends
  --ckpt_path last            resume from the newest checkpoint of this configuration's runs; best: the best one;
                              auto: the newest, or a new run where there is none
  --allow_changes true        resume under a configuration in which a step or the order of the data is another
  PRERL_DEBUG=1               full tracebacks and the start-up messages of vLLM and transformers
"""

FITS = ("fit", "validate", "test")
# what is no subcommand of LightningCLI: the module with a function of the command's name
COMMANDS = {
    "evaluate": "prerl_lightning.evaluation.command",
    "compare": "prerl_lightning.evaluation.command",
    "report": "prerl_lightning.report.page",
    "watch": "prerl_lightning.report.watch",
    "runs": "prerl_lightning.report.listing",
    "configs": "prerl_lightning.shipped",
    "study": "prerl_lightning.study.command",
    "doctor": "prerl_lightning.doctor",
    "plan": "prerl_lightning.planning",
    "convert": "prerl_lightning.convert",
    "export": "prerl_lightning.convert",
    "pretrain": "prerl_lightning.data.tasks.command",
    "job": "prerl_lightning.jobs.command",
    "help": "prerl_lightning.manual",
}


def main(argv: list[str] | None = None) -> None:
    """Entry point; exits with 2 on bad input, with 3 where a run was given up, with 1 where a rank was lost, each after
    one message, and with 128 and the number of a signal that ended it."""
    args = sys.argv[1:] if argv is None else argv
    if not args or args[0] in ("-h", "--help"):
        print(USAGE, end="")
        return
    if args[0] == "--version":
        print(f"prerl {__version__}")
        return
    if args[0] not in (names := (*FITS, *COMMANDS)):
        _refuse(InputError(f"{args[0]}: no such command.{nearest(args[0], names)} There are {', '.join(names)}."))
        sys.exit(2)
    debug = bool(os.environ.get("PRERL_DEBUG"))
    # idle OpenMP threads spin; beside any other busy process that made a run on 2 cores 25 times slower. With a short
    # spin it is 2 to 3 times slower there, and up to a fifth slower on a quiet machine.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    if not debug:
        quiet()
    log_to_stdout()
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())  # my_rewards.py beside the configuration; behind what is installed
    if args[0] in (*FITS, "evaluate"):
        signals.owns_process = True
        signals.listen()
        if not faulthandler.is_enabled():  # a crash in a library's native code says where in Python it was
            faulthandler.enable(sys.__stderr__ or 2)
    patience = 5.0  # seconds for the other ranks to end by themselves
    try:
        _command(args, debug)
        patience = 60.0
    except Interrupted:
        patience = 60.0
        raise
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `| head` has seen enough; what is still buffered has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + SIGPIPE)
    except Exception as error:
        said = None if debug else _said(error)
        # a collective call fails where another rank died, and does not say so
        lost = None if said or debug else watchdog.lost()
        if said is not None:
            _refuse(said)
        elif lost is None:
            raise
        elif watchdog.speaks:
            _refuse(f"{lost} {watchdog.mend}")
        sys.exit(3 if isinstance(said, RunError) else 2 if said else 1)
    finally:
        watchdog.finish(patience)
        signals.restore()
        signals.owns_process = False


def _command(args: list[str], debug: bool) -> None:
    if args[0] in COMMANDS:
        run: Callable[[list[str]], Any] = getattr(import_module(COMMANDS[args[0]]), args[0])
        args = args[1:]
    elif {"-h", "--help"} & set(args):
        from prerl_lightning.manual import options_of_a_run

        print(options_of_a_run(args[0]))
        return
    else:
        from prerl_lightning.refusals import checked

        args = checked(args)  # at once, rather than behind the next import
        from prerl_lightning.run import PrerlCLI

        run = PrerlCLI.run
    if not debug:
        quiet_lightning()
    run(args)
    sys.stdout.flush()


def _said(error: Exception) -> Exception | None:
    """An error of ours, which jsonargparse may have wrapped, or one of jsonargparse's in our words."""
    if (said := said_by_us(error)) is None and isinstance(error, ArgumentError):
        from prerl_lightning.refusals import of_parser

        return of_parser(error.message, [])
    return said


def _refuse(error: Exception | str) -> None:
    """What to look at first, the message last."""
    *details, last = printable_lines(str(error)).splitlines() or [""]
    print(*details, f"prerl: error: {last}", sep="\n", file=sys.stderr)


if __name__ == "__main__":
    main()
