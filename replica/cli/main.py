"""The command `replica`: what there is to type, and what becomes of errors.

Given     the words after `replica`.
Returns   0 done, 1 refused or failed, 2 usage, 3 not found, 4 not allowed, 5 not yet, 6 server unreachable.
Promises  a command's module is imported when the command runs, so that `replica --help` answers in under 200 ms;
          `--server`, `--token-file` and `-o` work before and after the subcommand; no traceback for anything foreseen.
Partner   one module a noun beside this one; replica.cli.output prints.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import click

from replica.cli.common import Group, Lazy

SERVICE = "Run it"
PLACES = "Places"
DATA = "Data"
WISHES = "Wishes and work"

#: name → (section, where the command is, what it does). Help is static: printing it imports no command.
COMMANDS: Mapping[str, Lazy] = {
    "demo": Lazy(SERVICE, "service:demo", "Three sites on this machine: load, replicate, break, heal, verify."),
    "up": Lazy(SERVICE, "service:up", "The whole system in one process: API, unattended work, site workers."),
    "serve": Lazy(SERVICE, "service:serve", "The API as a process of its own."),
    "worker": Lazy(SERVICE, "service:worker", "The worker of one site: it moves the bytes."),
    "control": Lazy(SERVICE, "service:control", "Unattended work: evaluates rules, watches leases, expires."),
    "migrate": Lazy(SERVICE, "service:migrate", "Create the database schema or bring it up to date."),
    "doctor": Lazy(SERVICE, "service:doctor", "Say what is configured, from where, and what is wrong."),
    "fsck": Lazy(SERVICE, "fsck:fsck", "Prove that the database agrees with itself; repair counters."),
    "whoami": Lazy(PLACES, "accounts:whoami", "Who the server takes you for."),
    "account": Lazy(PLACES, "accounts:account", "Accounts: people and programs that may sign in."),
    "quota": Lazy(PLACES, "quotas:quota", "Quotas: how much accounts may hold where."),
    "usage": Lazy(PLACES, "quotas:usage", "What accounts hold where, now and over time."),
    "site": Lazy(PLACES, "sites:site", "Sites: places with storage and a worker."),
    "endpoint": Lazy(PLACES, "endpoints:endpoint", "Endpoints: the storage at a site."),
    "limit": Lazy(PLACES, "limits:limit", "Limits on what is in flight at once, and shares of it."),
    "simulate": Lazy(PLACES, "simulate:simulate", "What the rules that adapt would do, on paper."),
    "scope": Lazy(DATA, "scopes:scope", "Scopes: the first half of every DID."),
    "did": Lazy(DATA, "dids:did", "Files, datasets and containers."),
    "register": Lazy(DATA, "replicas:register", "Make files known that are at an endpoint already."),
    "import": Lazy(DATA, "imports:import_", "Bring over what another system knows."),
    "upload": Lazy(DATA, "files:upload", "Copy files or directories to an endpoint and register them."),
    "download": Lazy(DATA, "files:download", "Fetch files or datasets, verified."),
    "locate": Lazy(DATA, "replicas:locate", "Where the replicas of a DID are."),
    "bad": Lazy(DATA, "integrity:bad", "Declare replicas bad: healed from good copies, nothing is destroyed."),
    "doubt": Lazy(DATA, "integrity:doubt", "Have replicas looked at by their site, whoever owns them."),
    "good": Lazy(DATA, "integrity:good", "Take that back; what was found wrong is read again first."),
    "repair": Lazy(DATA, "integrity:repair", "Mend a bad replica: only its damaged chunks are written anew."),
    "suspects": Lazy(DATA, "integrity:suspects", "Which replicas are doubted or bad, and why."),
    "scrub": Lazy(DATA, "integrity:scrub", "How endpoints are read again, to find what rots."),
    "rule": Lazy(WISHES, "rules:rule", "Rules: how many good copies, and where."),
    "subscription": Lazy(WISHES, "subscriptions:subscription", "Subscriptions: rules for all data of a kind."),
    "transfer": Lazy(WISHES, "transfers:transfer", "Transfers: what is being copied, and why not."),
    "scan": Lazy(WISHES, "scans:scan", "Whether an endpoint holds what the catalogue says, and nothing else."),
    "events": Lazy(WISHES, "events:events", "What happened, and with --follow what happens."),
    "webhook": Lazy(WISHES, "webhooks:webhook", "Webhooks: servers elsewhere that are told what happens."),
    "deletion": Lazy(WISHES, "deletions:deletion", "Deletions: which copies go, why, and how to keep them."),
}

EPILOG = (
    "A DID is written scope:name. REPLICA_SERVER and REPLICA_TOKEN_FILE say which server and who you are; "
    "`replica up` prints both."
)

#: Exit code of each branch of the error tree; the nearest ancestor counts.
EXIT_CODES: Mapping[str, int] = {
    "NotFound": 3,
    "NotAuthenticated": 4,
    "NotAllowed": 4,
    "Unavailable": 6,
    "ReplicaError": 1,
}


def exit_code(error: Exception) -> int:
    return next(EXIT_CODES[c.__name__] for c in type(error).__mro__ if c.__name__ in EXIT_CODES)


class Root(Group):
    """The top command; its `main` is where every error ends."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> NoReturn:
        sys.exit(self._run(args, prog_name or "replica", complete_var, extra))

    def _run(
        self, args: Sequence[str] | None, prog_name: str, complete_var: str | None, extra: Mapping[str, Any]
    ) -> int:
        from replica.cli.output import say, show_error
        from rules.errors import Refused, ReplicaError

        try:
            result: object = super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        except click.Abort:
            say("replica: interrupted")
            return 130
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.format_message(), err=True)
            return 2
        except click.UsageError as error:
            say(f"replica: {error.format_message()}")
            if error.ctx is not None:
                say(f"hint: see `{error.ctx.command_path} --help`")
            return 2
        except click.ClickException as error:
            say(f"replica: {error.format_message()}")
            return error.exit_code
        except ReplicaError as error:
            show_error(error)
            return exit_code(error)
        except OSError as error:
            if error.filename is None:
                raise
            show_error(Refused(f"{error.filename}: {(error.strerror or type(error).__name__).lower()}"))
            return 1
        return result if isinstance(result, int) else 0


root = Root(
    name="replica",
    help="Declare where good copies of research data must exist, and keep it true over many sites.",
    epilog=EPILOG,
    lazy=COMMANDS,
    sections=(SERVICE, PLACES, DATA, WISHES),
)


def _show_version(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if not wanted or context.resilient_parsing:
        return
    from importlib import metadata

    try:
        click.echo(f"replica {metadata.version('replica-manager')}")
    except metadata.PackageNotFoundError:
        click.echo("replica, not installed: run from its sources")
    context.exit()


root.params.append(
    click.Option(
        ["--version"],
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_show_version,
        help="Show the version and exit.",
    )
)


def main() -> None:
    """The console script."""
    root()


if __name__ == "__main__":
    main()
