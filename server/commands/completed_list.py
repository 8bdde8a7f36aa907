"""Completion of the names in a list by comma: also of those after the first one, in Bash, zsh and fish."""

from collections.abc import Sequence
from typing import Any

_FUNCTION = "_bitdial_precisions"
_BASH = """\
# $1: the word that is being completed. Names that it has are not offered again; Bash replaces the whole word.
{function}() {{
  local begun="" name names="{names}"
  [[ $1 == *,* ]] && begun="${{1%,*}},"
  [[ -z $begun ]] && names="$names {whole}"
  for name in $names; do
    [[ ",$begun" == *",$name,"* || "$begun$name" != "$1"* ]] || echo "$begun$name"
  done
}}
"""
_ZSH = """\
{function}() {{
  _values -s , precision {values}
}}
"""
_FISH = """\
# Names that the word has are not offered again; fish replaces the whole word.
function {function}
  set -l begun (string match -r '^.*,' -- (commandline -ct | string replace -r '^--[a-z-]+=' ''))
  for name in {names}
    string match -q -- "*,$name,*" ",$begun"; or echo "$begun$name"
  end
  test -n "$begun"; or echo {whole}
end
"""


def completed_list(names: Sequence[str], whole: str, shell: str) -> dict[str, Any] | None:
    """What shtab takes as an action's ``complete``; None for a shell in which only the first name completes.

    Args:
        names: what the list may have, each once.
        whole: the word that stands for a whole list, and never in one.
    """
    # zsh's exclusions: none beside the whole, and none of the others beside one
    values = [f"'({whole}){name}'" for name in names] + [f"'({' '.join(names)}){whole}'"]
    words = {"function": _FUNCTION, "names": " ".join(names), "whole": whole, "values": " ".join(values)}
    called = {"bash": _FUNCTION, "zsh": _FUNCTION, "fish": f"({_FUNCTION})"}
    if shell not in called:
        return None
    preambles = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}
    return {shell: called[shell], "preamble": {shell: preambles[shell].format(**words)}}
