#!/usr/bin/env python3
"""Publish folders of hub/ on the Hugging Face Hub, each as the repository NAMESPACE/ARCH.TAG, and the page as a Space.

    python hub/publish.py                          what would be published, without network
    python hub/publish.py ARCH.TAG --push          publish one
    python hub/publish.py ARCH.TAG --push --pin    and write its commit to timm_sharesnet/weights.json, for the loader
    python hub/publish.py --space --push           publish the page of space/ as the Space NAMESPACE/sharesnet
    python hub/publish.py --output DIR --namespace ME --push     publish folders of your own, of build.py --output DIR

Without names it takes all folders that have their weights. A repository is made private, gets its files in one commit,
is verified and only then made public. What is already there is not sent again, and what should not be there is deleted
in the same commit. --push needs huggingface-hub 1.1. The token is huggingface_hub's: `hf auth login`, HF_TOKEN or a
Trusted Publisher (HF_OIDC_RESOURCE, from huggingface-hub 1.19). Here nothing is written but weights.json, with --pin.
Exit code 0, or 2 and a line a fault.
"""

import contextlib
import filecmp
import os
import shlex
import signal
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import card
import catalog
import check
import folder
import huggingface_hub
import page
import timm
import torch
from folder import WEIGHTS
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    SpaceCard,
    constants,
    get_token,
    snapshot_download,
)
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import disable_progress_bars, logging
from packaging.version import Version

from timm_sharesnet.cli import CommandError, Parser, command

CHECKSUMS = '1.1'  # the first huggingface-hub that compares them
TRUSTED_PUBLISHERS = '1.19'  # the first that knows them
PINNED_ENDPOINT = 'https://huggingface.co'  # the only one whose commits the package may name
GITATTRIBUTES = '.gitattributes'  # the Hub's own, in every new repository
CARDS = {'model': ModelCard, 'space': SpaceCard}
# What the Hub puts into a new repository, beside nothing or a page that says how to begin
NEW = {'model': {GITATTRIBUTES}, 'space': {GITATTRIBUTES, 'README.md', 'index.html', 'style.css'}}


class Parcel(NamedTuple):
    """What is published.

    Args:
        path: Its files.
        repo_id: Its repository.
        repo_type: 'model' or 'space'.
        release: The model, or the one that the page shows.
        source: Where it is made from.
    """

    path: Path
    repo_id: str
    repo_type: str
    release: catalog.Release
    source: Path

    @property
    def address(self):
        prefix = constants.REPO_TYPES_URL_PREFIXES.get(self.repo_type, '')
        return f'{constants.ENDPOINT}/{prefix}{self.repo_id}'

    @property
    def repo(self):
        """How the client names it."""
        return {'repo_id': self.repo_id, 'repo_type': self.repo_type}

    def card(self):
        return CARDS[self.repo_type].load(self.path / 'README.md')


@command('publish.py')
def main(argv):
    parser = Parser(description=__doc__)
    parser.add_argument('names', nargs='*', metavar='ARCH.TAG', help='what to publish')
    parser.add_argument('--namespace', metavar='NS', help=f'{catalog.NAMESPACE} by default')
    catalog.add_output(parser)
    parser.add_argument('--space', action='store_true', help='publish the page, with the default weights')
    parser.add_argument('--push', action='store_true', help='publish')
    parser.add_argument('--pin', action='store_true', help='write the commit to weights.json')
    args = parser.parse_args(argv)
    if args.space and (args.names or args.output or args.pin):
        raise CommandError('--space is for the page, which has the default weights: no names, --output or --pin')
    shelf = catalog.open_shelf(args.output)
    namespace = catalog.choose_namespace(args.namespace, shelf)
    if args.push:
        require_hub(CHECKSUMS, '--push')
        folder.require_onnx()  # `check` needs it
    if args.pin:
        refuse_pin(args.push, shelf, namespace)
    with tempfile.TemporaryDirectory() as temporary:
        if args.space:
            parcels = [pack_space(shelf, namespace, Path(temporary))]
        else:
            parcels = pack_models(args, shelf, namespace)
        for parcel in parcels:
            show(parcel)
        if args.push:
            publish(parcels, namespace, args.pin)
        else:
            print('Nothing was sent. --push publishes.')


def publish(parcels, namespace, pin):
    """Push all, also after one failed."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up as after Ctrl-C
    disable_progress_bars()
    logging.set_verbosity_error()
    api, faults = log_in(namespace), []
    for parcel in parcels:
        try:
            oid = push(api, parcel)
        except CommandError as e:
            faults += [f'{parcel.repo_id}: {fault}' for fault in e.args]
            continue
        if pin:
            write_pin(parcel, oid)
    if faults:
        raise CommandError(*faults)


# The pin


def refuse_pin(push, shelf, namespace):
    """Raise unless the commit may be named in the package, from which every user loads."""
    if not push:
        raise CommandError('--pin needs --push, which tells the commit')
    if shelf.package is None:
        raise CommandError(
            '--pin is for what the package loads, not for folders of your own: load with hf-hub:NAMESPACE/ARCH.TAG'
        )
    if (namespace, constants.ENDPOINT) != (catalog.NAMESPACE, PINNED_ENDPOINT):
        raise CommandError(
            f'--pin is for {catalog.NAMESPACE} on {PINNED_ENDPOINT} only, not for {namespace} on {constants.ENDPOINT}: '
            'push without it, and load with hf-hub:NAMESPACE/ARCH.TAG'
        )


def write_pin(parcel, oid):
    shelf = parcel.release.shelf
    with shelf.locked():
        pins = folder.read_json(shelf.pins)
        pins[parcel.release.name] |= {'repo': parcel.repo_id, 'revision': oid}
        with folder.staged({shelf.pins: folder.to_json(pins)}) as written:
            folder.replace(written)
    print(f'{parcel.repo_id}: weights.json names commit {oid}; commit it and release the package')


# Without network


def pack_models(args, shelf, namespace):
    """The models that are named, or all that are here with their weights, if nothing is wrong with any."""
    names = args.names or [name for name in shelf.names() if (shelf.path / name / WEIGHTS).is_file()]
    if not names:
        raise CommandError(f'there is nothing to publish in {shelf.path}')
    releases = [catalog.parse(name, shelf) for name in names]
    for release in releases if args.pin else ():
        if release.other_args:
            raise CommandError(
                f'--pin: the package loads by name, so {release.name} would lack {card.tell_args(release)}'
            )
    faults = [f'{r.name}: {fault}' for r in releases for fault in local_faults(r, namespace, args.push)]
    if faults:
        raise CommandError(*faults)
    return [Parcel(r.path, f'{namespace}/{r.name}', 'model', r, r.path) for r in releases]


def pack_space(shelf, namespace, work):
    """The page, put together in a directory."""
    release, path = page.default_release(shelf), work / catalog.SPACE
    path.mkdir()
    page.assemble(release, namespace, path)
    return Parcel(path, f'{namespace}/{catalog.SPACE}', 'space', release, page.SOURCE)


def local_faults(release, namespace, push):
    """Why a folder may not be published. Only before a push, the weights are loaded, too."""
    path, name = release.path, release.name
    faults = check.check(release, sample=False) if push else check.static_faults(release)
    faults = faults or [f'{part} is not here' for part in folder.LARGE if not (path / part).exists()]
    if faults:
        return faults
    written_for = card.card_namespace((path / 'README.md').read_text(encoding='utf-8'), name)
    if written_for == namespace:
        return []
    argv = ['python', os.path.relpath(folder.HUB / 'build.py'), release.shown, '--model', name]
    if release.shelf.package is None:
        argv += ['--output', os.path.relpath(release.shelf.path)]
    again = shlex.join([*argv, '--namespace', namespace])
    return [f'the card was written for {written_for}, not for {namespace}: {again}']


def show(parcel):
    files = {file: path.stat().st_size for file, path in folder.files(parcel.path).items()}
    print(f'{os.path.relpath(parcel.source)} -> {parcel.address}')
    for file, size in files.items():
        print(f'{size:>13,}  {file}')
    print(f'{sum(files.values()):>13,}  bytes, {len(files)} files', flush=True)


# With the Hub


def require_hub(version, what):
    """Raise if the installed huggingface-hub is older."""
    found = huggingface_hub.__version__
    if Version(found) < Version(version):
        raise CommandError(
            f"{what} needs huggingface-hub {version}, found {found}: pip install -U 'huggingface-hub>={version}'"
        )


def log_in(namespace):
    """The Hub with the user's token, if it may write to the namespace as far as can be known beforehand."""
    if os.environ.get('HF_OIDC_RESOURCE'):
        require_hub(TRUSTED_PUBLISHERS, 'a Trusted Publisher (HF_OIDC_RESOURCE)')
    with step('reading the token'):
        token = get_token()
    if not token:
        raise CommandError('there is no token: `hf auth login`, or set HF_TOKEN to one that may write')
    api = HfApi(token=token)
    if not os.environ.get('HF_OIDC_RESOURCE'):  # such a token belongs to a repository, not to a person
        with step(f'asking {constants.ENDPOINT} whose token this is'):
            me = api.whoami()
        if me.get('auth', {}).get('accessToken', {}).get('role') == 'read':
            raise CommandError(f'the token of {me["name"]} is read-only: make one that may write to {namespace}')
        if namespace not in (me['name'], *(org['name'] for org in me.get('orgs', []))):
            raise CommandError(f'the token belongs to {me["name"]}, who is not in the namespace {namespace}')
    return api


def push(api, parcel):
    """Bring a repository to the state of its folder, and show it to everyone. Returns the commit."""
    repo_id = parcel.repo_id
    with step('validating the card'):
        parcel.card().validate()
    if parcel.repo_type == 'space':
        require_model(api, parcel)
    before = find(api, parcel)
    try:
        info = before or create(api, parcel)
        oid = commit(api, info, parcel)
        verify(api, parcel, oid)
    except BaseException as e:
        state = clean_up(api, parcel, before)
        if isinstance(e, CommandError):
            raise CommandError(*e.args, state) from e
        print(f'{repo_id}: {state}', file=sys.stderr)
        raise
    if info.private:
        with step(f'commit {oid} is there and verified; making it public'):
            error = attempt(api.update_repo_settings, **parcel.repo, private=False)
            if api.repo_info(**parcel.repo).private:
                raise error or CommandError(f'commit {oid} is verified, but the Hub still shows it as private')
    print(f'{repo_id}: {"unchanged, " if oid == info.sha else ""}verified and public at commit {oid}')
    return oid


def require_model(api, parcel):
    """Raise unless everyone finds the model that the page names."""
    name, namespace = parcel.release.name, parcel.repo_id.partition('/')[0]
    info = find(api, parcel._replace(repo_id=f'{namespace}/{name}', repo_type='model'))
    if info is None or info.private:
        raise CommandError(f'the page links to {namespace}/{name}, which is not public: publish.py {name} --push')


def find(api, parcel):
    """What the Hub knows of a repository, or None if there is none."""
    with step('looking for the repository'):
        try:
            info = api.repo_info(**parcel.repo)
        except RepositoryNotFoundError:
            return None
    if info.id != parcel.repo_id:
        raise CommandError(f'it was renamed or transferred to {info.id}, which whoever owns it now may change')
    return info


def create(api, parcel):
    """Make a private repository."""
    with step('making the repository'):
        kind = {'space_sdk': 'static'} if parcel.repo_type == 'space' else {}
        error = attempt(api.create_repo, **parcel.repo, **kind, private=True)
        info = find(api, parcel)
        if info is None:
            raise error or CommandError('the Hub does not show the new repository yet: run this again')
        return info


def attempt(request, **kwargs):
    """The error of a request, if any: it may have been done all the same, and only the answer was lost."""
    try:
        request(**kwargs)
    except Exception as e:
        return e
    return None


def commit(api, info, parcel):
    """Make the repository hold the folder's files and nothing else, in one commit at most. Returns its hash."""
    there, wanted = {file.rfilename for file in info.siblings}, folder.files(parcel.path)
    operations = [CommitOperationAdd(name, file) for name, file in wanted.items()]
    operations += [CommitOperationDelete(name) for name in sorted(there - wanted.keys() - {GITATTRIBUTES})]
    message = f'Publish {parcel.path.name}'
    with step('uploading'):
        try:
            return api.create_commit(
                **parcel.repo, operations=operations, commit_message=message, parent_commit=info.sha
            ).oid
        except Exception as e:
            if _status(e) == 412:
                raise CommandError('somebody else committed at the same time: look at it, then run this again') from e
            with contextlib.suppress(Exception):
                now = api.repo_info(**parcel.repo).sha
                if now != info.sha:  # it was made, and only the answer was lost; `verify` tells
                    return now
            raise


def verify(api, parcel, oid):
    """Raise unless a commit is on main, holds the folder's files alone, has a card, and is loaded as it was sent."""
    with step(f'verifying commit {oid}'):
        info = api.repo_info(**parcel.repo)
        found = api.verify_repo_checksums(**parcel.repo, revision=oid, local_dir=parcel.path)
        wrong = {file['path'] for file in found.mismatches} | set(found.extra_paths)
        wrong |= set(found.missing_paths) - {GITATTRIBUTES}
        if info.sha != oid:
            raise CommandError(f'somebody else has committed {info.sha} since: look at it, then run this again')
        if wrong:
            raise CommandError(f'not as sent: {", ".join(sorted(wrong))}')
        {'model': verify_model, 'space': verify_space}[parcel.repo_type](info, parcel, oid)


def verify_model(info, parcel, oid):
    """Raise unless the Hub reads the card, and timm loads the same net."""
    card_data, ours = info.card_data, parcel.card().data
    if not card_data or card_data.library_name != 'timm' or bool(card_data.eval_results) != bool(ours.eval_results):
        raise CommandError('the Hub does not see the metadata of the card')
    with tempfile.TemporaryDirectory() as cache:
        loaded = timm.create_model(f'hf-hub:{parcel.repo_id}@{oid}', pretrained=True, cache_dir=cache).eval()
    sent = folder.load(parcel.path)
    images = torch.randn(2, *sent.pretrained_cfg['input_size'])
    found, expected = loaded.state_dict(), sent.state_dict()
    if found.keys() != expected.keys() or not all(torch.equal(found[k], expected[k]) for k in expected):
        raise CommandError('timm does not load the same weights from the Hub as from the folder')
    with torch.inference_mode():
        if not torch.allclose(loaded(images), sent(images)):
            raise CommandError('timm does not build the same net from the Hub as from the folder')


def verify_space(info, parcel, oid):
    """Raise unless the Hub takes it for a static page, and gives the same files."""
    if not info.card_data or info.card_data.sdk != 'static':
        raise CommandError('the Hub does not see the metadata of the card')
    names = folder.files(parcel.path)
    with tempfile.TemporaryDirectory() as there:
        snapshot_download(**parcel.repo, revision=oid, local_dir=there)
        _, other, missing = filecmp.cmpfiles(parcel.path, there, names, shallow=False)
    if other or missing:
        raise CommandError(f'the Hub gives other files than were sent: {", ".join([*other, *missing])}')


def clean_up(api, parcel, before):
    """Delete a repository that this run made if it is still empty. Tells what became of it."""
    try:
        info = find(api, parcel)
        if info is None:
            return 'no repository was left behind'
        if before:
            return f'it is {"unchanged" if info.sha == before.sha else "now"} at commit {info.sha}'
        if info.private and {file.rfilename for file in info.siblings} <= NEW[parcel.repo_type]:
            api.delete_repo(**parcel.repo)
            return 'the new repository was still empty and was deleted'
        return f'the new repository is {"private" if info.private else "public"} at commit {info.sha}: run this again'
    except Exception:
        return f'what became of {parcel.address} is not known: look at it, or run this again'


@contextlib.contextmanager
def step(what):
    """Turn whatever goes wrong into a fault that says at what."""
    try:
        yield
    except CommandError:
        raise
    except Exception as e:
        raise CommandError(f'{what}: {_explain(e)}') from e


def _explain(e):
    if isinstance(e, RuntimeError) and e.__cause__:  # 'Error while uploading', which does not tell why
        e = e.__cause__
    reasons = {401: 'the Hub does not accept the token', 403: 'the token may not do this'}
    status, message = _status(e), getattr(e, 'server_message', None) or str(e)
    if status is None:
        return f'{type(e).__name__}: {message}'
    return f'{reasons.get(status, "the Hub refuses")} (HTTP {status}: {message})'


def _status(e):
    return getattr(getattr(e, 'response', None), 'status_code', None)


if __name__ == '__main__':
    sys.exit(main())
