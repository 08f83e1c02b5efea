# SPDX-License-Identifier: Apache-2.0
"""`python -m vlmq_trl.envs [WORD ...]`: the environments, what each domain needs, and whether it can run here.

Without a word, a summary of the domains; with words, every id that contains one of them.
"""

from __future__ import annotations

import argparse
import shutil
import textwrap

from vlmq_trl.envs import DOMAINS, Domain, install_line


def overview() -> str:
    """One paragraph a domain."""
    return "\n\n".join(_paragraph(domain) for domain in DOMAINS)


def _paragraph(domain: Domain) -> str:
    width = min(110, shutil.get_terminal_size().columns)
    missing = domain.missing()
    ids = list(domain.envs)
    shown = ids if len(ids) <= 8 else [*ids[:6], f"... {len(ids)} in all"]
    needs = "nothing more" if domain.extra is None else install_line(domain.extra)
    lines = [
        f"{'✗' if missing else '✓'} {domain.name}: {domain.summary}",
        f"  needs: {needs}" if not missing else f"  missing here: {missing}",
        *textwrap.wrap(", ".join(shown), width, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False),
    ]
    return "\n".join(lines)


def search(words: list[str]) -> str:
    """Every id that contains one of `words`, whatever their case, by domain."""
    wanted = [word.lower() for word in words]
    blocks = []
    for domain in DOMAINS:
        ids = [env_id for env_id in domain.envs if any(word in f"{domain.name} {env_id}".lower() for word in wanted)]
        if ids:
            missing = domain.missing()
            blocks.append("\n".join([f"{domain.name}{f' (missing here: {missing})' if missing else ''}", *ids]))
    return "\n\n".join(blocks)


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m vlmq_trl.envs", description="The environments of vlmq_trl.")
    parser.add_argument("words", nargs="*", metavar="WORD", help="show every id that contains it, such as babyai")
    words = parser.parse_args(arguments).words
    found = search(words) if words else overview()
    print(found or f"No environment has {' or '.join(map(repr, words))} in its name.")
    if not words:
        print(
            "\nAll ids of a domain: python -m vlmq_trl.envs babyai\n"
            "Watch an episode:    python -m vlmq_trl.show vlmq_trl/NumberLine-v0 --policy expert"
        )


if __name__ == "__main__":
    main()
