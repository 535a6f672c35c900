"""``completion``: a script that completes verbs and flags in a shell; it knows them when it is printed."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from torchrl_maxmin.cli.fields import read_config
from torchrl_maxmin.cli.parsing import OneLineParser
from torchrl_maxmin.cli.recipes import read_recipes

__all__ = ["SHELLS", "completion", "completion_script", "words_after"]

SHELLS = ("bash", "zsh", "fish")

_BASH = """\
# torchrl-maxmin: completion of verbs and flags; in ~/.bashrc:
#   eval "$(torchrl-maxmin completion bash)"
_torchrl_maxmin() {
    local word="${COMP_WORDS[COMP_CWORD]}" words=""
    COMPREPLY=()
    if [ "$COMP_CWORD" -eq 1 ]; then
        words="@VERBS@"
    else
        case "${COMP_WORDS[1]}" in
@CASES@
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}
complete -o default -F _torchrl_maxmin torchrl-maxmin
"""
_ZSH = """\
#compdef torchrl-maxmin
# torchrl-maxmin: completion of verbs and flags; in ~/.zshrc, after compinit:
#   eval "$(torchrl-maxmin completion zsh)"
_torchrl_maxmin() {
    if (( CURRENT == 2 )); then
        compadd -- @VERBS@
        return
    fi
    local -a flags
    case "${words[2]}" in
@CASES@
    esac
    if [[ "$PREFIX" == -* || "${flags[1]}" != --* ]]; then
        compadd -- $flags
    else
        _files
    fi
}
compdef _torchrl_maxmin torchrl-maxmin
"""
_FISH = """\
# torchrl-maxmin: completion of verbs and flags; in ~/.config/fish/config.fish:
#   torchrl-maxmin completion fish | source
"""


def completion_script(shell: str, verbs: Mapping[str, str], words: Mapping[str, Sequence[str]]) -> str:
    """Write the script of a shell.

    Args:
        shell: one of :data:`SHELLS`.
        verbs: a line of help by verb.
        words: flags, or words, that may follow each verb.
    """
    names = " ".join([*verbs, "--help", "--version"])
    if shell == "fish":
        lines = [
            f"complete -c torchrl-maxmin -n __fish_use_subcommand -f -a {verb} -d {_quoted(line)}"
            for verb, line in verbs.items()
        ]
        for verb, following in words.items():
            seen = f"-n '__fish_seen_subcommand_from {verb}'"
            for word in following:
                kind = f"-l {word[2:]}" if word.startswith("--") else f"-a {word}"
                lines.append(f"complete -c torchrl-maxmin {seen} {kind}")
        return _FISH + "\n".join(lines) + "\n"
    if shell == "bash":
        cases = [f'        {verb}) words="{" ".join(following)}" ;;' for verb, following in words.items()]
        return _BASH.replace("@VERBS@", names).replace("@CASES@", "\n".join(cases))
    cases = [f"        {verb}) flags=({' '.join(following)}) ;;" for verb, following in words.items()]
    return _ZSH.replace("@VERBS@", names).replace("@CASES@", "\n".join(cases))


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def words_after(verb: str) -> list[str]:
    """Return the flags and words that may follow a verb.

    Args:
        verb: any of the command line's.
    """
    from torchrl_maxmin.cli.main import ENV_PPO, PLAN, STAGES
    from torchrl_maxmin.cli.tools import data_parser

    if verb in STAGES or verb == "plan":
        stages = [PLAN] if verb == "plan" else [STAGES[verb], *([ENV_PPO] if verb == "ppo" else [])]
        names = [name for module, config, *_ in stages for name in read_config(module, config).fields]
        own = ["--config", "--print_config", "--help", "--help-all"]
        return [*(f"--{name}" for name in dict.fromkeys(names)), *own]
    if verb == "data":
        flags = [word for action in data_parser()._actions for word in action.option_strings]
        return ["check", *(word for word in flags if word.startswith("--"))]
    following = {"recipes": ["ls", "cp", *read_recipes()], "completion": list(SHELLS)}
    return [*following.get(verb, []), "--help"]


def completion(arguments: Sequence[str]) -> int:
    """``completion bash|zsh|fish``: print the script."""
    from torchrl_maxmin.cli.main import OTHERS, STAGES

    parser = OneLineParser(
        prog="torchrl-maxmin completion",
        description='A script that completes verbs and flags: eval "$(torchrl-maxmin completion bash)".',
    )
    parser.add_argument("shell", choices=SHELLS, help="for which shell")
    shell = parser.parse_args(list(arguments)).shell
    verbs = {name: row[-1] for name, row in (STAGES | OTHERS).items()}
    sys.stdout.write(completion_script(shell, verbs, {verb: words_after(verb) for verb in verbs}))
    return 0
