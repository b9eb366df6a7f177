"""``lowbit --completion SHELL``: a script that completes commands, their options, packaged configs and files."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lowbit_command import COMMANDS
from lowbit_command.configs import NAMES

_LOOPS = ("--config", "--ckpt_path", "--resume", "--print_config", "--help")
WORDS = {
    **dict.fromkeys(("fit", "validate", "test", "predict"), _LOOPS),
    "configs": ("list", "show", "copy", "--help"),
    "plan": ("--config", "--memory", "--json", "--help"),
    "doctor": ("--full", "--json", "--markdown", "--help"),
    "report": ("--output", "--help"),
    "sweep": ("--config", "--set", "--paired", "--jobs", "--metric", "--help"),
    "convert": ("--bits", "--to", "--config", "--output", "--overwrite", "--trust", "--help"),
}

BASH = """_lowbit() {
    local word=${COMP_WORDS[COMP_CWORD]} words
    if [ "$COMP_CWORD" = 1 ]; then words="@COMMANDS@ --help --version --completion"
    else case ${COMP_WORDS[1]} in
@CASES@
        --completion) words="bash zsh fish" ;;
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word") $(compgen -f -- "$word"))
}
complete -o filenames -F _lowbit lowbit"""

HOW = {
    "bash": 'eval "$(lowbit --completion bash)"',
    "zsh": 'eval "$(lowbit --completion zsh)"',
    "fish": "lowbit --completion fish | source",
}


def run(given: Sequence[str]) -> int:
    shell = given[0] if given else ""
    if shell not in HOW:
        print(f"lowbit: --completion takes bash, zsh or fish, got {shell!r}", file=sys.stderr)
        return 2
    print(f"# put this into your shell's start-up file: {HOW[shell]}")
    print(script(shell))
    return 0


def script(shell: str) -> str:
    return _fish() if shell == "fish" else _bash(zsh=shell == "zsh")


def _words(command: str) -> list[str]:
    return [*WORDS.get(command, ("--help",)), *(NAMES if command == "configs" else ())]


def _bash(zsh: bool) -> str:
    cases = "\n".join(f'        {command}) words="{" ".join(_words(command))}" ;;' for command in COMMANDS)
    head = "autoload -U +X bashcompinit && bashcompinit\n" if zsh else ""
    return head + BASH.replace("@COMMANDS@", " ".join(COMMANDS)).replace("@CASES@", cases)


def _fish() -> str:
    lines = [f"complete -c lowbit -n __fish_use_subcommand -f -a {name} -d {what!r}" for name, what in COMMANDS.items()]
    for command in COMMANDS:
        seen = f"__fish_seen_subcommand_from {command}"
        lines.append(f"complete -c lowbit -n '{seen}' -a '{' '.join(_words(command))}'")
    return "\n".join(lines)
