"""`mmkd store diff` and `mmkd store tag`: two stores compared, and names for what a store holds."""

from __future__ import annotations

import sys

import click

from mmkd.base.places.remote import StorePath, as_root
from mmkd.cli.params import JSON, STORE_PATH, echo
from mmkd.store import FeatureStore
from mmkd.store.inspect.versions import differences, make_tag, read_tag, store_content, tag_names


@click.command()
@click.argument("one", metavar="A", type=as_root)
@click.argument("other", metavar="B", type=as_root)
@JSON
def diff(one: StorePath, other: StorePath, as_json: bool) -> None:
    """Report in which rows, teachers, shards and selections B differs from A; exit status 1 if it does.

    Cards and ledgers are compared; `mmkd store verify` says whether a store's bytes are what its ledger says.
    """
    found = list(differences(*(store_content(FeatureStore.open(path)) for path in (one, other))))
    echo(as_json, {"equal": not found, "differences": found}, found or ["equal: rows, teachers and selections"])
    sys.exit(1 if found else 0)


@click.command()
@STORE_PATH
@click.argument("name", required=False)
@JSON
def tag(path: StorePath, name: str | None, as_json: bool) -> None:
    """Give what STORE holds now a NAME that never changes; without NAME, list the tags and what changed since.

    A tag is a digest of the rows, the teachers with their ledger entries, and the selections. Without NAME, the exit
    status is 1 if STORE is not what one of its tags says.
    """
    store = FeatureStore.open(path)
    if name is not None:
        made = make_tag(store, name)
        echo(as_json, made.model_dump(mode="json"), [f"{made.name}  {made.created}  digest {made.digest}"])
        return
    tags = [read_tag(path, each) for each in tag_names(path)]
    content = store_content(store) if tags else None
    changes = {each.name: each.changes(content) for each in tags} if content else {}
    lines = [
        f"{each.name}  {each.created}  digest {each.digest[:16]}  {'; '.join(changes[each.name]) or 'unchanged'}"
        for each in tags
    ]
    facts = [each.model_dump(mode="json") | {"changes": changes[each.name]} for each in tags]
    echo(as_json, facts, lines or ["no tags"])
    sys.exit(1 if any(changes.values()) else 0)
