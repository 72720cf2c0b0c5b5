"""The commands: their names, options and help, and what an error looks like.

This module owns the outside of the command line: usage, exit codes (0 done, 1 failed, 2 usage, 130
interrupted) and that an error is one line that says what happened and what to do. It must not know
what a command does: each imports its work when it runs, so that ``chat`` never waits for libraries
that only ``serve`` needs.
"""

# ruff: noqa: FBT002, PLR0913, PLR0917 - a command's parameters are its options

from __future__ import annotations

import errno
import logging
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from crdt_llm.cli.engine_options import CPU, EngineOptions, WeightFormat
from crdt_llm.cli.printable import one_line
from crdt_llm.errors import CrdtLlmError, LocalMisuse

if TYPE_CHECKING:
    from collections.abc import Sequence

FAILED: Final = 1
USAGE: Final = 2
INTERRUPTED: Final = 130  # 128 + SIGINT, as shells say it

DEFAULT_PORT: Final = 8765
DEFAULT_URL: Final = f"http://127.0.0.1:{DEFAULT_PORT}/"
DEFAULT_DEVICE: Final = "terminal"
# As in crdt_llm.inference.models.folders, which a help text should not have to load.
DEFAULT_MODEL: Final = "smollm2-135m"

KV_MEMORY_MIB_MIN: Final = 1
KV_MEMORY_MIB_MAX: Final = 1 << 24  # 16 TiB: whoever asks for more has mistaken the unit

LEASE_TTL_S: Final = 10.0  # as in crdt_llm.sync.relay.leases
LEASE_TTL_S_MIN: Final = 1.0  # leases are looked after once a second
LEASE_TTL_S_MAX: Final = 600.0  # so long people wait for a reply whose node was killed

# Two builds of one model differ by some thousandths; one build by nothing.
DEFAULT_TOLERANCE: Final = 0.01

_ID_CHARACTERS: Final = 22
_KEY_CHARACTERS: Final = 43  # of a node, likewise in base64url
_INFERENCE_PACKAGES: Final = frozenset(
    {
        "gguf",
        "huggingface_hub",
        "jinja2",
        "numpy",
        "safetensors",
        "tokenizers",
        "torch",
        "transformers",
    }
)


def _complain(message: str) -> None:
    """One line on standard error."""
    print(f"crdt-llm: {one_line(message)}", file=sys.stderr)  # noqa: T201 - the terminal


def explain(error: Exception) -> tuple[str, int]:
    """What to tell people about an error, and the exit code."""
    if isinstance(error, LocalMisuse):
        return str(error), USAGE
    if isinstance(error, CrdtLlmError):
        return str(error), FAILED
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        package = error.name.partition(".")[0]
        if package in _INFERENCE_PACKAGES:
            return (
                f"this needs {package}, which is not installed: pip install 'crdt-llm[inference]'",
                FAILED,
            )
    if isinstance(error, OSError) and error.strerror:
        what = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        taken = error.errno == errno.EADDRINUSE
        return what + (": stop the program that has it, or choose --port" if taken else ""), FAILED
    return (
        f"unexpected {type(error).__name__}: {error} (--verbose shows where; please report it)",
        FAILED,
    )


class Command(TyperCommand):
    """A command that ends every error in one line, and takes ids that begin with a dash."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse; what has the form of a conversation's id, or of a key, is never an option.

        One in 64 begins with a dash.
        """
        if "--" not in args:
            ids = [word for word in args if _is_dashed_id(word)]
            if ids:
                args = [*(word for word in args if word not in ids), "--", *ids]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        verbose = bool(ctx.params.get("verbose"))
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, typer.TyperException, BrokenPipeError):
            raise
        except Exception as error:  # noqa: BLE001 - the outermost frame: it becomes one line
            message, code = explain(error)
            if verbose:
                traceback.print_exception(error)
            _complain(message)
            raise typer.Exit(code) from None


def _is_dashed_id(word: str) -> bool:
    return (
        word.startswith("-")
        and len(word) in {_ID_CHARACTERS, _KEY_CHARACTERS}
        and word.replace("-", "").replace("_", "").isalnum()
        and word.isascii()
    )


app = typer.Typer(
    name="crdt-llm",
    cls=TyperGroup,
    help="A replicated conversation store for language models: relay, node and terminal client.",
    epilog="Example: crdt-llm serve &  then: crdt-llm chat",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain help; and the library behind it takes long to load
    pretty_exceptions_enable=False,
)
model_app = typer.Typer(
    help="Models on this machine.",
    epilog="Example: crdt-llm model fetch",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(model_app, name="model")
token_app = typer.Typer(
    help="Access for other people, devices and nodes.",
    epilog="Example: crdt-llm token issue ada --expires 30d",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(token_app, name="token")

_Data = Annotated[
    Path | None,
    typer.Option("--data", help="The data folder; by default this user's.", show_default=False),
]
_Url = Annotated[str, typer.Option("--url", help="The relay's address.")]
_TokenFile = Annotated[
    Path | None,
    typer.Option(
        "--token-file",
        help="Who we are to the relay; by default DATA/owner.token.",
        show_default=False,
    ),
]
_Model = Annotated[
    str, typer.Option("--model", help="A model folder, a hub id (org/model), or the default one.")
]
_Json = Annotated[bool, typer.Option("--json", help="Print facts as JSON.")]
_Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Log to standard error; show where errors arise.")
]


_Weights = Annotated[
    WeightFormat | None,
    typer.Option(
        help="How the model's weights are held: bf16 as published, int8 in half of that. By"
        " default int8 for a Llama on the cpu, else bf16.",
        show_default=False,
    ),
]
_EngineDevice = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="DEVICE",
        help="Where the model computes: cpu, cuda, cuda:1, mps. On the cpu a Llama is exact to the"
        " bit.",
    ),
]
_KvMemory = Annotated[
    int | None,
    typer.Option(
        min=KV_MEMORY_MIB_MIN,
        max=KV_MEMORY_MIB_MAX,
        metavar="MIB",
        help="The most memory that the KV cache may take; what does not fit goes to DATA/kv."
        " By default 2048.",
        show_default=False,
    ),
]


@app.command(cls=Command, epilog="Example: crdt-llm serve --port 9000 --data ./data")
def serve(
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = DEFAULT_PORT,
    data: _Data = None,
    model: _Model = DEFAULT_MODEL,
    no_node: Annotated[bool, typer.Option("--no-node", help="Relay only: no replies.")] = False,
    kv_memory: _KvMemory = None,
    weights: _Weights = None,
    device: _EngineDevice = CPU,
    lease_ttl: Annotated[
        float, typer.Option(min=LEASE_TTL_S_MIN, max=LEASE_TTL_S_MAX, hidden=True)
    ] = LEASE_TTL_S,
    verbose: _Verbose = False,
) -> None:
    """Run the relay, the inference node and the page.

    Prints one line, `ready http://…`, when it accepts connections. The first run makes keys and the
    owner's token in the data folder.
    """
    from crdt_llm.cli.serve import run_serve  # noqa: PLC0415 - see the module's docstring

    run_serve(
        host=host,
        port=port,
        data=data,
        model=model,
        node=not no_node,
        engine=EngineOptions.chosen(kv_memory, weights, device),
        lease_ttl_s=lease_ttl,
        verbose=verbose,
    )


@app.command(
    cls=Command,
    epilog="Example: crdt-llm node --url wss://relay.example.org/ --token-file node.token",
)
def node(
    url: _Url = DEFAULT_URL,
    token_file: Annotated[
        Path | None,
        typer.Option(
            "--token-file",
            help="A token for a node (`crdt-llm token issue node --node`); by default"
            " DATA/node.token.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data", help="The node's own folder; by default in this user's.", show_default=False
        ),
    ] = None,
    model: _Model = DEFAULT_MODEL,
    key: Annotated[
        Path | None,
        typer.Option(
            help="The node's signing key; by default DATA/node.key, made by the first run.",
            show_default=False,
        ),
    ] = None,
    master_key: Annotated[
        Path | None,
        typer.Option(
            help="A copy of the relay's keys/master.key, which seals what is hidden; by default"
            " DATA/master.key.",
            show_default=False,
        ),
    ] = None,
    kv_memory: _KvMemory = None,
    weights: _Weights = None,
    device: _EngineDevice = CPU,
    verbose: _Verbose = False,
) -> None:
    """Run an inference node for a relay that is elsewhere.

    Prints one line, `ready KEY`, when it is connected and can answer. Any number of nodes may serve
    one relay; each conversation has one at a time, and another takes over if that one is gone.
    """
    from crdt_llm.cli.node import NodeFolder, run_node  # noqa: PLC0415 - see the module's docstring

    run_node(
        url=url,
        token_file=NodeFolder.named(data).token if token_file is None else token_file,
        data=data,
        model=model,
        key=key,
        engine=EngineOptions.chosen(kv_memory, weights, device),
        master_key=master_key,
        verbose=verbose,
    )


@app.command(
    cls=Command,
    epilog="Example: crdt-llm chat   or: echo 'Name three rivers.' | crdt-llm chat --new",
)
def chat(
    conversation: Annotated[
        str | None,
        typer.Argument(
            help="Its id, or how that begins; by default the last one.", show_default=False
        ),
    ] = None,
    url: _Url = DEFAULT_URL,
    token_file: _TokenFile = None,
    data: _Data = None,
    device: Annotated[
        str, typer.Option(help="This device's name; each has replicas of its own.")
    ] = DEFAULT_DEVICE,
    new: Annotated[bool, typer.Option("--new", help="Begin a conversation.")] = False,
    list_: Annotated[
        bool, typer.Option("--list", help="List this device's conversations and exit.")
    ] = False,
    system: Annotated[
        str | None,
        typer.Option(help="What a new conversation begins with.", show_default=False),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="The longest reply.", show_default=False)
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="0 is greedy.", show_default=False)
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="The same seed, the same reply.", show_default=False)
    ] = None,
    no_drafts: Annotated[
        bool, typer.Option("--no-drafts", help="Do not let the node read what is being typed.")
    ] = False,
    json: _Json = False,
    verbose: _Verbose = False,
) -> None:
    """Talk to the model; from a pipe, send one message and print the reply.

    Works offline: what is written is kept on this device and sent when the relay is there. At the
    prompt, /help lists the commands.
    """
    from crdt_llm.cli.chat import Wish, run_chat  # noqa: PLC0415 - see the module's docstring
    from crdt_llm.cli.folders import DataFolder  # noqa: PLC0415 - as above

    _log(verbose=verbose)
    wish = Wish(
        conversation=conversation,
        new=new,
        system=system,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        json=json,
        drafts=not no_drafts,
    )
    folder = DataFolder.named(data)
    _exit(run_chat(wish, folder=folder, device=device, url=url, token_file=token_file, list_=list_))


@app.command(cls=Command, epilog="Example: crdt-llm inspect --verify")
def inspect(
    conversation: Annotated[
        str | None,
        typer.Argument(
            help="Its id, or how that begins; by default the last one.", show_default=False
        ),
    ] = None,
    data: _Data = None,
    url: Annotated[
        str | None,
        typer.Option(help="Ask a running relay instead of DATA's log.", show_default=False),
    ] = None,
    token_file: _TokenFile = None,
    all_: Annotated[bool, typer.Option("--all", help="Every branch, not just the shown.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Recompute the chain, and each text from its tokens.")
    ] = False,
    hidden: Annotated[
        bool, typer.Option("--hidden", help="Show sealed tokens and parameters (needs the key).")
    ] = False,
    model: _Model = DEFAULT_MODEL,
    json: _Json = False,
    verbose: _Verbose = False,
) -> None:
    """Show a conversation entry by entry: place, state, cost, proof.

    Reads the server's data folder, whether or not `serve` runs, or asks a relay with --url. Exits
    with 1 if --verify finds something that does not hold.
    """
    from crdt_llm.cli.folders import DataFolder  # noqa: PLC0415 - see the module's docstring
    from crdt_llm.cli.inspect import Question, run_inspect  # noqa: PLC0415 - as above

    _log(verbose=verbose)
    question = Question(
        conversation=conversation, all=all_, verify=verify, hidden=hidden, model=model, json=json
    )
    folder = DataFolder.named(data)
    _exit(run_inspect(question, folder=folder, url=url, token_file=token_file))


@app.command(cls=Command, epilog="Example: crdt-llm replay --json")
def replay(
    conversation: Annotated[
        str | None,
        typer.Argument(
            help="Its id, or how that begins; by default the last one.", show_default=False
        ),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Also compare the KV cache with what was recorded live."),
    ] = False,
    data: _Data = None,
    model: _Model = DEFAULT_MODEL,
    weights: _Weights = None,
    device: _EngineDevice = CPU,
    json: _Json = False,
    verbose: _Verbose = False,
) -> None:
    """Compute a conversation's replies again, token by token, and compare.

    Exits with 1 if they differ.
    """
    from crdt_llm.cli.replay import run_replay  # noqa: PLC0415 - see the module's docstring

    _log(verbose=verbose)
    _exit(
        run_replay(
            conversation=conversation,
            data=data,
            model=model,
            engine=EngineOptions(weights=weights, device=device),
            as_json=json,
            check_kv=verify,
        )
    )


@app.command(cls=Command, epilog="Example: crdt-llm audit --weights bf16 --tolerance 0.1")
def audit(
    conversation: Annotated[
        str | None,
        typer.Argument(
            help="Its id, or how that begins; by default the last one.", show_default=False
        ),
    ] = None,
    tolerance: Annotated[
        float,
        typer.Option(min=0.0, help="The largest difference of a log-probability, in nats."),
    ] = DEFAULT_TOLERANCE,
    data: _Data = None,
    model: _Model = DEFAULT_MODEL,
    weights: _Weights = None,
    device: _EngineDevice = CPU,
    json: _Json = False,
    verbose: _Verbose = False,
) -> None:
    """Give every recorded token to the model again, and compare how likely it was.

    Exits with 1 if anything differs by more than the tolerance, or a choice would change.
    """
    from crdt_llm.cli.audit import run_audit  # noqa: PLC0415 - see the module's docstring

    _log(verbose=verbose)
    _exit(
        run_audit(
            conversation=conversation,
            data=data,
            model=model,
            engine=EngineOptions(weights=weights, device=device),
            tolerance=tolerance,
            as_json=json,
        )
    )


@app.command(cls=Command, epilog="Example: crdt-llm export --output talk.yjs")
def export(
    conversation: Annotated[
        str | None,
        typer.Argument(
            help="Its id, or how that begins; by default the last one.", show_default=False
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The file; standard output else.", show_default=False),
    ] = None,
    form: Annotated[
        Literal["document", "json", "markdown"],
        typer.Option("--format", help="`document` is everything, and can be brought back."),
    ] = "document",
    data: _Data = None,
    url: Annotated[
        str | None,
        typer.Option(help="Ask a running relay instead of DATA's log.", show_default=False),
    ] = None,
    token_file: _TokenFile = None,
    verbose: _Verbose = False,
) -> None:
    """Write a conversation to a file."""
    from crdt_llm.cli.export import Format, run_export  # noqa: PLC0415 - see the module's docstring
    from crdt_llm.cli.folders import DataFolder  # noqa: PLC0415 - as above

    _log(verbose=verbose)
    run_export(
        conversation,
        folder=DataFolder.named(data),
        url=url,
        token_file=token_file,
        form=Format(form),
        output=output,
    )


@app.command("import", cls=Command, epilog="Example: crdt-llm import talk.yjs")
def import_(
    file: Annotated[Path, typer.Argument(help="What `export` wrote, as a document.")],
    trust: Annotated[
        bool,
        typer.Option(
            "--trust", help="Take a conversation that this relay has never known, or forgot."
        ),
    ] = False,
    replace: Annotated[
        bool,
        typer.Option(
            "--replace",
            help="Drop what is stored of a conversation that lacks something admitted, for a file"
            " that lacks nothing.",
        ),
    ] = False,
    data: _Data = None,
    json: _Json = False,
    verbose: _Verbose = False,
) -> None:
    """Bring a conversation back from a file, hidden fields included.

    While no relay serves the data folder. What the file says is believed as far as it proves
    itself; what was taken without proof is listed.
    """
    from crdt_llm.cli.folders import DataFolder  # noqa: PLC0415 - see the module's docstring
    from crdt_llm.cli.import_ import run_import  # noqa: PLC0415 - as above

    _log(verbose=verbose)
    if trust and replace:
        raise LocalMisuse("--trust is for what was forgotten, --replace for what is known")
    run_import(file, folder=DataFolder.named(data), trust=trust, replace=replace, json=json)


@app.command(cls=Command, epilog="Example: crdt-llm conformance http://127.0.0.1:8765/")
def conformance(
    url: Annotated[str, typer.Argument(metavar="URL", help="The endpoint's address.")],
    token_file: _TokenFile = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Run this case; repeat it for several.", show_default=False),
    ] = None,
    crash: Annotated[
        str | None,
        typer.Option(
            help="A shell command that kills the endpoint and starts it again; without it those"
            " cases are skipped.",
            show_default=False,
        ),
    ] = None,
    wipe: Annotated[
        str | None,
        typer.Option(
            help="A shell command that kills the endpoint, removes the log with every"
            " conversation in it (log.db*), keeps the register, keys and tokens, and starts it"
            " again; without it those cases are skipped. Never where there are conversations to"
            " keep.",
            show_default=False,
        ),
    ] = None,
    deadline: Annotated[
        float, typer.Option(min=0.1, help="Seconds that anything may take.")
    ] = 20.0,
    report: Annotated[
        Path | None,
        typer.Option(help="Write the results to this file, as JSON.", show_default=False),
    ] = None,
    json: _Json = False,
    verbose: _Verbose = False,
) -> None:
    """Try whether an endpoint keeps the protocol's promises, case by case.

    It makes conversations of its own and leaves others alone; what --wipe removes is up to your
    command. Exits with 1 if a promise is broken.
    """
    from crdt_llm.cli.conformance import run_conformance  # noqa: PLC0415 - see the docstring
    from crdt_llm.cli.folders import DataFolder  # noqa: PLC0415 - as above

    _log(verbose=verbose)
    _exit(
        run_conformance(
            url,
            token_file=token_file or DataFolder.named(None).token,
            only=only or (),
            crash=crash,
            wipe=wipe,
            deadline_s=deadline,
            report=report,
            json=json,
        )
    )


@model_app.command(cls=Command, epilog="Example: crdt-llm model fetch")
def fetch(
    name: Annotated[
        str, typer.Argument(help="The default model, a hub id (org/model), or a folder to check.")
    ] = DEFAULT_MODEL,
    json: _Json = False,
    verbose: _Verbose = False,
) -> None:
    """Bring a model to this machine, once, and print its folder."""
    from crdt_llm.cli.model import run_fetch  # noqa: PLC0415 - see the module's docstring

    _log(verbose=verbose)
    run_fetch(name, json=json)


@model_app.callback()
def _model() -> None:
    """Models on this machine."""


@token_app.command(cls=Command, epilog="Example: crdt-llm token issue node-2 --node > node-2.token")
def issue(
    principal: Annotated[str, typer.Argument(help="Whom it stands for.")],
    expires: Annotated[
        str | None,
        typer.Option(help="When it ends: 90m, 12h, 30d, 8w.", show_default=False),
    ] = None,
    conversation: Annotated[
        list[str] | None,
        typer.Option(
            help="Only there, and at most so much: ID=owner, ID=writer or ID=reader. Repeat it for"
            " several.",
            show_default=False,
        ),
    ] = None,
    node: Annotated[bool, typer.Option("--node", help="For an inference node.")] = False,
    data: _Data = None,
    json: _Json = False,
    verbose: _Verbose = False,
) -> None:
    """Make an access token and print it; it is kept nowhere else.

    A token says who somebody is. What that principal may do is said in each conversation, by its
    owner (`/share` in chat).
    """
    from crdt_llm.cli.folders import DataFolder  # noqa: PLC0415 - see the module's docstring
    from crdt_llm.cli.token import run_issue  # noqa: PLC0415 - as above

    _log(verbose=verbose)
    run_issue(
        principal,
        folder=DataFolder.named(data),
        expires=expires,
        scopes=conversation or (),
        node=node,
        json=json,
    )


@token_app.command("list", cls=Command, epilog="Example: crdt-llm token list --json")
def list_tokens(data: _Data = None, json: _Json = False, verbose: _Verbose = False) -> None:
    """List the tokens that were given out, without the tokens themselves."""
    from crdt_llm.cli.folders import DataFolder  # noqa: PLC0415 - see the module's docstring
    from crdt_llm.cli.token import run_list  # noqa: PLC0415 - as above

    _log(verbose=verbose)
    run_list(folder=DataFolder.named(data), json=json)


@token_app.command(cls=Command, epilog="Example: crdt-llm token revoke 5f0c2b9e71d4a683")
def revoke(
    token_id: Annotated[str, typer.Argument(metavar="ID", help="As `token list` shows it.")],
    data: _Data = None,
    verbose: _Verbose = False,
) -> None:
    """End a token. A running relay closes its connections within seconds."""
    from crdt_llm.cli.folders import DataFolder  # noqa: PLC0415 - see the module's docstring
    from crdt_llm.cli.token import run_revoke  # noqa: PLC0415 - as above

    _log(verbose=verbose)
    run_revoke(token_id, folder=DataFolder.named(data))


@token_app.command("nodes", cls=Command, epilog="Example: crdt-llm token nodes --json")
def list_nodes(data: _Data = None, json: _Json = False, verbose: _Verbose = False) -> None:
    """List the keys of nodes, and whose each is: the principal whose token it first came with."""
    from crdt_llm.cli.folders import DataFolder  # noqa: PLC0415 - see the module's docstring
    from crdt_llm.cli.token import run_nodes  # noqa: PLC0415 - as above

    _log(verbose=verbose)
    run_nodes(folder=DataFolder.named(data), json=json)


@token_app.command(
    cls=Command,
    epilog="Example: crdt-llm token unbind 2fO0iY5bQmS4bq6qO2J8kAqvV2t0T1cZt3xkHn5uQ7E",
)
def unbind(
    key: Annotated[str, typer.Argument(help="As `token nodes` shows it, or how that begins.")],
    data: _Data = None,
    verbose: _Verbose = False,
) -> None:
    """Let a node's key come with another principal's token from now on.

    For a node that gets a token with another name, or moves to somebody else. It ends no
    connection: revoke the old token, so that nobody takes the key back with it.
    """
    from crdt_llm.cli.folders import DataFolder  # noqa: PLC0415 - see the module's docstring
    from crdt_llm.cli.token import run_unbind  # noqa: PLC0415 - as above

    _log(verbose=verbose)
    run_unbind(key, folder=DataFolder.named(data))


@token_app.callback()
def _token() -> None:
    """Access for other people, devices and nodes."""


def _log(*, verbose: bool) -> None:
    """Log to standard error if that was asked for; a terminal is for the conversation else."""
    logger = logging.getLogger("crdt_llm")
    if not verbose:
        logger.addHandler(logging.NullHandler())
        logger.propagate = False
        return
    form = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(format=form, stream=_StandardError())
    logger.setLevel(logging.DEBUG)


class _StandardError:
    """Standard error as it is now: a prompt replaces it, so that logs do not write across."""

    def write(self, text: str) -> int:
        return sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()


def _exit(code: int) -> NoReturn:
    raise typer.Exit(code)


def main() -> NoReturn:
    """Run the process's command line, and end the process."""
    code = run(sys.argv[1:])
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read has left, as `head` does. The interpreter would complain when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = FAILED
    sys.exit(code)


def run(words: Sequence[str]) -> int:
    """Run a command line.

    Args:
        words: without the program's name.

    Returns:
        The exit code: 0 done, 1 failed, 2 usage, 130 interrupted.
    """
    try:
        code = app(list(words), prog_name="crdt-llm", standalone_mode=False)
    except typer.TyperException as error:
        return _refuse_usage(error)
    except typer.Abort:
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    return code if isinstance(code, int) else 0


def _refuse_usage(error: typer.TyperException) -> int:
    message = error.format_message()
    if message.startswith("Usage:"):  # a group without a command: its whole help
        print(message, file=sys.stderr)  # noqa: T201 - the terminal
        return error.exit_code
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "crdt-llm"
    _complain(f"{message.rstrip('.')}: `{path} --help` shows the usage")
    return error.exit_code
