"""hub/publish.py with the real `huggingface_hub` client against the stand-in, and the snippets of every card.

Each case runs the script in a process of its own, forked from one that has imported timm, on a copy of the folders.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import models
import publish
import pytest
import timm
import torch
import yaml
from hub_project import NAME, ROOT, edit, flip_last_byte, read_files, save, snapshot, snippets
from hub_server import Blob, Commit, Failure, HubServer, Token
from packaging.version import Version
from PIL import Image

REPO = f'timm-sharesnet/{NAME}'
SPACE = 'spaces/timm-sharesnet/sharesnet'
FILES = {'README.md', 'config.json', 'curves.png', 'model.safetensors', 'preprocessor_config.json', 'training.json'}
FILES |= {'onnx/model.onnx', 'onnx/model_quantized.onnx'}
WORKER = """
import json, os, runpy, signal, sys, time, traceback
import huggingface_hub.hf_api, huggingface_hub.repocard, onnx, onnxruntime, PIL.Image, safetensors.torch, timm, torch
import yaml
time.sleep = lambda seconds: None  # huggingface_hub waits up to 8 s before it tries again
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell is born deaf to it
for line in sys.stdin:
    job = json.loads(line)
    pid = os.fork()
    if not pid:
        os.environ.update(job['env'])
        os.chdir(job['cwd'])
        for i, path in enumerate(('/dev/null', job['out'], job['err'])):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), i)
        sys.argv = job['argv']
        sys.path[0] = os.path.dirname(sys.argv[0])
        if job['static']:
            import check
            check.check = lambda release, sample: check.static_faults(release)
        code = 0
        try:
            runpy.run_path(sys.argv[0], run_name='__main__')
        except SystemExit as e:
            code = e.code
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        os._exit(code)  # torch takes long to go
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.fixture(scope='module')
def server():
    with HubServer() as server:
        yield server


@pytest.fixture(scope='module')
def environment(server, tmp_path_factory):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(('HF_', 'HUGGING', 'TIMM_SHARESNET'))}
    home = tmp_path_factory.mktemp('home')
    settings = {'HF_ENDPOINT': server.endpoint, 'HF_HOME': str(home), 'HF_HUB_DISABLE_XET': '1', 'OMP_NUM_THREADS': '1'}
    return clean | settings


@pytest.fixture(scope='module')
def worker(environment):
    process = subprocess.Popen(
        [sys.executable, '-c', WORKER], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    yield process
    process.stdin.close()
    process.wait()


@pytest.fixture
def hub(server):
    server.reset()
    server.tokens['hf_write'] = Token('me', orgs=['timm-sharesnet'])
    return server


@pytest.fixture
def run(worker, project):
    """Run a script in a fork of the worker: exit status, output, lines of standard error.

    It must not alter any file, but for weights.json with `--pin`. Unless `loaded`, the folder is verified without
    loading the model, which takes long: test_hub_check.py has it.
    """

    def run(*argv, script='hub/publish.py', token='hf_write', env=None, started=None, cwd=project, loaded=False):
        if '--push' in argv and Version(huggingface_hub.__version__) < Version('1.1'):
            pytest.skip('publishing needs huggingface-hub 1.1')
        out, err = cwd / 'out.txt', cwd / 'err.txt'
        env = {**(env or {}), **({'HF_TOKEN': token} if token else {})}
        job = {'argv': [str(project / script), *argv], 'cwd': str(cwd), 'out': str(out), 'err': str(err), 'env': env}
        job['static'] = script == 'hub/publish.py' and not loaded
        before = snapshot(project)
        worker.stdin.write(json.dumps(job) + '\n')
        worker.stdin.flush()
        pid = int(worker.stdout.readline())
        if started:
            started(pid)
        code = int(worker.stdout.readline())
        assert 'Traceback' not in err.read_text()
        if '--pin' not in argv:
            assert snapshot(project) == before
        return code, out.read_text(), err.read_text().splitlines()

    return run


@pytest.fixture
def push(run):
    """Push the folder, or what is named, which must go well. Returns the output."""

    def push(*argv, **kwargs):
        code, out, err = run(*(argv or [NAME]), '--push', **kwargs)
        assert (code, err) == (0, [])
        return out

    return push


@pytest.fixture
def fails(run):
    """Push the folder, or what is named, which must fail first of all for a reason. Returns the lines that say so."""

    def fails(reason, *argv, **kwargs):
        code, _, err = run(*(argv or [NAME]), '--push', **kwargs)
        assert code == 2 and reason in err[0], err
        return err

    return fails


def published(server, project):
    """Whether the stand-in holds exactly the folder, publicly, in one commit after the first."""
    repo = server.repos[REPO]
    files = {name: blob.data for name, blob in repo.head.files.items() if name != '.gitattributes'}
    folder = project / 'hub' / NAME
    return not repo.private and files == {name: (folder / name).read_bytes() for name in FILES}


def writes(server):
    return [r for r in server.requests if not r.startswith(('GET', 'HEAD')) and 'validate-yaml' not in r]


# Without --push


def test_dry_run_lists_files_and_sizes_without_a_request(run, hub, project):
    code, out, err = run(token=None)
    assert (code, err, hub.requests) == (0, [], [])
    for name in FILES:
        assert f'{(project / "hub" / NAME / name).stat().st_size:,}  {name}\n' in out
    assert f'-> {hub.endpoint}/{REPO}\n' in out


# --push


def test_push_publishes_in_one_commit_and_again_is_a_no_op(push, hub, project):
    out, repo = push(loaded=True), hub.repos[REPO]
    assert published(hub, project)
    assert [c.title for c in repo.commits] == ['initial commit', f'Publish {NAME}']
    assert repo.head.files['model.safetensors'].lfs and not repo.head.files['README.md'].lfs
    assert f'public at commit {repo.head.oid}' in out
    # the card was accepted before the repository was made, which was private until the files were verified
    order = ['POST /api/validate-yaml', 'POST /api/repos/create', f'POST /api/models/{REPO}/commit/main']
    order += [f'GET /api/models/{REPO}/tree/{repo.head.oid}', f'PUT /api/models/{REPO}/settings']
    assert [hub.requests.index(r) for r in order] == sorted(hub.requests.index(r) for r in order)

    hub.requests.clear()
    assert 'unchanged' in push()
    assert len(repo.commits) == 2 and published(hub, project)
    assert not any(re.search('PUT|create|/commit/|settings', r) for r in writes(hub))


def test_push_deletes_stale_files_in_the_same_commit(run, hub, project):
    folder = project / 'hub' / NAME
    hub.create(REPO, {**read_files(folder), 'onnx/old.onnx': b'old', 'sub/old.txt': b'old', 'README.md': b'# old\n'})
    assert run('--push')[0] == 0  # all folders
    assert published(hub, project) and len(hub.repos[REPO].commits) == 3


def test_push_finishes_what_a_killed_one_left(run, push, hub, project):
    hub.fail('POST', '/commit/', Failure.HANG)
    kill = once_asked(hub, '/commit/', lambda pid: os.kill(pid, signal.SIGKILL))
    assert run(NAME, '--push', started=kill)[0] == -signal.SIGKILL
    assert hub.repos[REPO].private  # nobody sees what is there
    push()
    assert published(hub, project)


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_interrupted_push_leaves_no_empty_repository(fails, hub, number):
    hub.fail('POST', '/preupload/', Failure.HANG)
    err = fails('', started=once_asked(hub, '/preupload/', lambda pid: os.kill(pid, number)))
    assert not hub.repos
    assert err[-2:] == [f'{REPO}: the new repository was still empty and was deleted', 'publish.py: interrupted']


def once_asked(hub, part, act):
    """What to do with a process that was started: wait for a request of it, then act."""

    def started(pid):
        deadline = time.monotonic() + 60
        while not any(part in request for request in hub.requests):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        act(pid)

    return started


REFUSALS = {
    'no token': (None, 'there is no token: `hf auth login`, or set HF_TOKEN'),
    'unknown token': ('hf_unknown', 'the Hub does not accept the token (HTTP 401'),
    'read-only token': ('hf_read', 'the token of me is read-only'),
    'foreign namespace': ('hf_you', 'belongs to you, who is not in the namespace timm-sharesnet'),
}


@pytest.mark.parametrize(('token', 'message'), REFUSALS.values(), ids=REFUSALS)
def test_push_is_refused_with(fails, hub, token, message):
    hub.tokens |= {'hf_read': Token('me', ['timm-sharesnet'], 'read'), 'hf_you': Token('you')}
    assert len(fails(message, token=token)) == 1 and not hub.repos and not writes(hub)


def test_token_that_may_not_write_to_the_repository_changes_nothing(fails, hub):
    """As of a fine-grained token, whose rights only the attempt tells."""
    hub.tokens['hf_fine'] = Token('me', ['timm-sharesnet'], 'fineGrained')
    fails('making the repository: the token may not do this (HTTP 403', token='hf_fine')
    assert not hub.repos
    head = hub.create(REPO, {'README.md': b'# old\n'})
    err = fails('uploading: the token may not do this (HTTP 403', token='hf_fine')
    assert hub.repos[REPO].head.oid == head and not hub.lfs
    assert err[1:] == [f'publish.py: {REPO}: it is unchanged at commit {head}']


def test_token_is_read_from_the_file_of_hf_auth_login(fails, hub, environment):
    file = Path(environment['HF_HOME'], 'token')
    file.write_text('hf_unknown')
    try:
        fails('does not accept the token', token=None)
    finally:
        file.unlink()


def test_trusted_publisher_that_gets_no_token_is_told(fails, hub):
    assert len(fails('reading the token: ', env={'HF_OIDC_RESOURCE': REPO})) == 1 and not hub.requests


def test_push_needs_a_newer_huggingface_hub(scripts, run_imported, monkeypatch):
    monkeypatch.setattr('huggingface_hub.__version__', '0.36.2')
    code, _, err = run_imported('publish', NAME, '--push')
    error = "publish.py: --push needs huggingface-hub 1.1, found 0.36.2: pip install -U 'huggingface-hub>=1.1'"
    assert (code, err) == (2, [error])


def test_trusted_publisher_needs_a_newer_huggingface_hub(monkeypatch):
    monkeypatch.setattr('huggingface_hub.__version__', '1.18.9')
    monkeypatch.setenv('HF_OIDC_RESOURCE', REPO)
    with pytest.raises(publish.CommandError, match=r'needs huggingface-hub 1\.19, found 1\.18\.9: pip install -U'):
        publish.log_in('timm-sharesnet')
    monkeypatch.setattr('huggingface_hub.__version__', '1.19.0')
    monkeypatch.setattr(publish, 'get_token', lambda: 'hf_oidc')
    publish.log_in('timm-sharesnet')


def test_card_that_the_hub_refuses_is_found_before_anything_is_sent(fails, hub, monkeypatch):
    monkeypatch.setattr('hub_server.LICENSES', {'mit'})
    (error,) = fails('validating the card')
    assert 'must be one of' in error and not hub.repos and not writes(hub)


FAILURES = {
    # while nothing is there yet: nothing is left
    'card: 503': ('POST', 'validate-yaml', 503, 1),
    'create: 500': ('POST', 'repos/create', 500, 1),
    'create: cut': ('POST', 'repos/create', Failure.CUT, 1),
    'preupload: 503': ('POST', '/preupload/', 503, 99),
    'upload: 503': ('PUT', '/lfs/', 503, 99),
    'upload: cut': ('PUT', '/lfs/', Failure.CUT, 99),
    'commit: 500': ('POST', '/commit/', 500, 99),
    'commit: cut': ('POST', '/commit/', Failure.CUT, 99),
}


@pytest.mark.parametrize('failure', FAILURES.values(), ids=FAILURES)
def test_failed_push_leaves_no_repository(fails, hub, failure):
    hub.fail(*failure)
    err = fails('')
    assert not hub.repos
    assert all(line.startswith(f'publish.py: {REPO}: ') for line in err) and len(err) <= 2
    assert ('HTTP 50' in err[0]) == isinstance(failure[2], int)


def test_failed_push_leaves_a_published_repository_as_it_was(fails, hub):
    head = hub.create(REPO, {'README.md': b'# old\n', 'model.safetensors': b'old'})
    hub.fail('POST', '/commit/', Failure.CUT, 99)
    err = fails('')
    assert hub.repos[REPO].head.oid == head and not hub.repos[REPO].private
    assert err[-1] == f'publish.py: {REPO}: it is unchanged at commit {head}'


PASSING = {
    'create: answer lost': ('POST', 'repos/create', Failure.LOST, 1),
    'upload: 503 once': ('PUT', '/lfs/', 503, 1),
    'upload: cut once': ('PUT', '/lfs/', Failure.CUT, 1),
    'commit: answer lost': ('POST', '/commit/', Failure.LOST, 1),
    'commit: slow': ('POST', '/commit/', 2.0, 1),
}


@pytest.mark.parametrize('case', PASSING)
def test_push_gets_over(push, hub, project, case):
    hub.fail(*PASSING[case])
    push()
    assert published(hub, project) and len(hub.repos[REPO].commits) == 2


def test_network_that_is_dead_from_the_start(fails, hub):
    hub.fail('GET', '', Failure.CUT, 99)
    assert len(fails(f'asking {hub.endpoint} whose token this is: ')) == 1


@pytest.mark.parametrize('failure', [('GET', '/tree/', 503, 99), ('HEAD', '/resolve/', Failure.CUT, 99)])
def test_repository_that_cannot_be_verified_stays_private(push, fails, hub, project, failure):
    hub.fail(*failure)
    err, repo = fails('verifying commit '), hub.repos[REPO]
    oid = repo.head.oid
    assert repo.private and len(err) == 2 and f'verifying commit {oid}: ' in err[0]
    assert err[1].endswith(f'the new repository is private at commit {oid}: run this again')
    hub.heal()
    push()
    assert published(hub, project)


@pytest.mark.parametrize(
    ('where', 'file', 'message'),
    [
        pytest.param('commit', 'model.safetensors', 'not as sent: model.safetensors', marks=pytest.mark.slow),
        ('commit', 'onnx/model.onnx', 'not as sent: onnx/model.onnx'),
        ('storage', 'model.safetensors', 'timm does not load the same weights from the Hub as from the folder'),
    ],
)
def test_other_bytes_than_sent_are_noticed(fails, hub, project, where, file, message):
    hub.fail('GET', '/tree/', 3.0)

    def damage(_pid):
        files = hub.repos[REPO].head.files
        data = files[file].data
        other = data[:-1] + bytes([data[-1] ^ 1])
        if where == 'commit':
            files[file] = Blob(other, lfs=True)
        else:
            hub.lfs[files[file].oid] = other

    fails(message, started=once_asked(hub, '/tree/', damage))
    assert hub.repos[REPO].private


def test_concurrent_commit_is_not_overwritten(fails, hub):
    hub.create(REPO, {'README.md': b'# old\n'})
    hub.fail('POST', '/preupload/', 3.0)

    def commit(_pid):
        repo = hub.repos[REPO]
        repo.commits.append(Commit('theirs', {**repo.head.files, 'theirs.txt': Blob(b'theirs')}, repo.head.oid))

    fails('somebody else committed at the same time', started=once_asked(hub, '/preupload/', commit))
    assert hub.repos[REPO].head.title == 'theirs'


def test_renamed_repository_is_refused(fails, hub):
    hub.renamed[REPO] = f'new-owner/{NAME}'
    head = hub.create(f'new-owner/{NAME}', {'README.md': b'# theirs\n'})
    fails(f'it was renamed or transferred to new-owner/{NAME}')
    assert list(hub.repos) == [f'new-owner/{NAME}'] and hub.repos[f'new-owner/{NAME}'].head.oid == head


# The page


@pytest.fixture
def model(hub, project):
    """The model is public."""
    hub.create(REPO, read_files(project / 'hub' / NAME))
    return hub.repos[REPO]


def page_is_published(server):
    """Whether the stand-in holds a page with four nets, publicly, in one commit after the first."""
    repo = server.repos[SPACE]
    files = {name: blob.data for name, blob in repo.head.files.items()}
    nets = json.loads(files['nets.json'])['nets']
    same = all(len(files[net['file']]) == net['bytes'] for net in nets)
    return not repo.private and len(repo.commits) == 2 and len(nets) == 4 and same and b'<main>' in files['index.html']


def test_space_is_shown_without_a_request_and_nothing_is_sent(run, hub):
    code, out, err = run('--space', token=None)
    assert (code, err, hub.requests) == (0, [], [])
    assert f'hub/space -> {hub.endpoint}/spaces/timm-sharesnet/sharesnet\n' in out
    assert '1,428,633  onnx/model_quantized.onnx' in out and out.endswith('Nothing was sent. --push publishes.\n')


def test_space_is_made_private_verified_and_shown_and_again_is_a_no_op(push, hub, model):
    out = push('--space')
    assert page_is_published(hub)
    repo = hub.repos[SPACE]
    assert [c.title for c in repo.commits] == ['initial commit', 'Publish sharesnet']
    data = yaml.safe_load(repo.head.files['README.md'].data.decode().split('---\n')[1])
    assert (data['sdk'], data['models'], data['license']) == ('static', [REPO], 'apache-2.0')
    assert f'public at commit {repo.head.oid}' in out and len(model.commits) == 2
    order = ['POST /api/validate-yaml', 'POST /api/repos/create', f'POST /api/{SPACE}/commit/main']
    order += [f'GET /api/{SPACE}/tree/{repo.head.oid}', f'PUT /api/{SPACE}/settings']
    assert [hub.requests.index(r) for r in order] == sorted(hub.requests.index(r) for r in order)
    hub.requests.clear()
    assert 'unchanged' in push('--space') and page_is_published(hub)
    assert not any(re.search('PUT|create|/commit/|settings', r) for r in writes(hub))


def test_space_of_a_model_that_is_not_public_is_refused(fails, hub, model):
    message = f'the page links to {REPO}, which is not public: publish.py {NAME} --push'
    model.private = True
    assert len(fails(message, '--space')) == 1
    del hub.repos[REPO]
    assert len(fails(message, '--space')) == 1 and not hub.repos


@pytest.mark.parametrize('failure', [('POST', '/preupload/', 503, 99), ('POST', '/commit/', Failure.CUT, 99)])
def test_failed_push_leaves_no_space(fails, hub, model, failure):
    hub.fail(*failure)
    err = fails('uploading', '--space')
    assert SPACE not in hub.repos and err[1].endswith('the new repository was still empty and was deleted')


def test_space_that_the_hub_gives_otherwise_stays_private(fails, hub, model):
    def damage(_pid):
        blob = hub.repos[SPACE].head.files['onnx/model_quantized.onnx']
        hub.lfs[blob.oid] = b'damaged'

    hub.fail('GET', f'{SPACE}/tree/', 1.0)
    fails('', '--space', started=once_asked(hub, f'{SPACE}/tree/', damage))
    assert hub.repos[SPACE].private


def test_space_of_damaged_nets_or_with_other_options_is_refused(fails, hub, project):
    for extra in ([NAME], ['--pin'], ['--output', str(project / 'own')]):
        assert len(fails('no names, --output or --pin', '--space', *extra)) == 1
    flip_last_byte(project / 'hub' / NAME / 'onnx' / 'model.onnx')
    assert len(fails('onnx/model.onnx is not the file of the manifest', '--space')) == 1 and not hub.requests


# What may not be published at all


def test_folder_that_is_not_as_recorded_is_refused_before_any_request(run, fails, hub, project):
    folder = project / 'hub' / NAME
    cases = {
        'pytorch_model.bin does not belong there': lambda: (folder / 'pytorch_model.bin').write_bytes(b''),
        'model.safetensors has the SHA-256': lambda: flip_last_byte(folder / 'model.safetensors'),
        'onnx/model.onnx has the SHA-256': lambda: flip_last_byte(folder / 'onnx' / 'model.onnx'),
        'README.md does not have the line:       value: 0.9431': lambda: edit(folder / 'README.md', '0.9431', '0.944'),
        'curves.png is missing': lambda: (folder / 'curves.png').unlink(),
    }
    for alter in cases.values():
        alter()
    err = fails('')
    assert not hub.requests
    for message in cases:
        assert any(message in line for line in err), (message, err)
    shutil.rmtree(folder)
    assert run(NAME)[2] == [f'publish.py: {NAME}: no folder {folder}']
    assert 'is not ARCH.TAG' in run('../secrets')[2][0]


def test_folder_whose_untracked_files_are_not_here_is_refused(fails, hub, project):
    """They would be deleted on the Hub."""
    shutil.rmtree(project / 'hub' / NAME / 'onnx')
    with (project / 'hub' / '.gitignore').open('a') as file:
        file.write(f'/{NAME}/onnx/\n')
    assert fails('') == [f'publish.py: {NAME}: onnx/ is not here'] and not hub.requests


@pytest.mark.parametrize(('argv', 'env'), [(['--namespace', 'me'], {}), ([], {'TIMM_SHARESNET_NAMESPACE': 'me'})])
def test_namespace_that_the_card_was_not_written_for_is_refused(fails, hub, argv, env):
    message = f'hub/build.py hub/{NAME} --model {NAME} --namespace me'
    assert len(fails(message, NAME, *argv, env=env)) == 1 and not hub.requests


def test_people_publish_in_a_namespace_of_their_own_and_the_pins_stay(push, hub, project):
    edit(project / 'hub' / NAME / 'README.md', 'timm-sharesnet/', 'me/')  # as build.py --namespace me writes it
    push(env={'TIMM_SHARESNET_NAMESPACE': 'me'})
    assert list(hub.repos) == [f'me/{NAME}'] and not hub.repos[f'me/{NAME}'].private


def test_net_of_own_data_is_published_from_a_directory_of_its_own_and_ours_still_are(
    run, push, fails, hub, project, tmp_path, any_onnx, built
):
    """The push loads it as hf-hub:me/ARCH.TAG and compares the weights, see `verify`."""
    own, name, ours = tmp_path / 'à moi', 'sharesnet164_cifar.oiseaux', snapshot(project)
    model = timm.create_model('sharesnet164_cifar', num_classes=3)
    arguments = ('--output', str(own), '--namespace', 'me')
    weights = save(tmp_path / 'x.pth', model.state_dict())
    built(weights, '--model', name, *arguments, '--dataset-name', 'Mes oiseaux')
    code, out, err = run(*arguments, token=None)
    assert (code, err) == (0, []) and f'-> {hub.endpoint}/me/{name}\n' in out and not hub.requests
    push(*arguments)
    repo = hub.repos[f'me/{name}']
    files = {name: blob.data for name, blob in repo.head.files.items() if name != '.gitattributes'}
    assert not repo.private and files == read_files(own / name)
    for extra, message in {
        ('--pin',): '--pin is for what the package loads, not for folders of your own',
        ('--namespace', 'you'): 'the card was written for me, not for you: python hub/build.py ',
        ('--namespace', ''): '--output needs the namespace of your own to publish in',
    }.items():
        assert len(fails(message, *arguments, *extra)) == 1
    push()
    assert published(hub, project) and snapshot(project) == ours


def test_net_with_arguments_is_published_with_them_and_not_pinned(
    run, push, fails, hub, project, tmp_path, any_onnx, built
):
    args = {'layers': [2, 2, 2], 'act_layer': 'silu', 'global_pool': 'max', 'in_chans': 1}
    model, name = models.create('sharesnet164_cifar', **args), 'sharesnet164_cifar.silu_c10'
    timm.models.save_for_hf(model, str(tmp_path / 'saved'), model_args=args, safe_serialization=True)
    built(tmp_path / 'saved', '--model', name)
    take_for_the_real_hub(project, hub)
    message = f'the package loads by name, so {name} would lack `layers=[2, 2, 2]`, '
    assert len(fails(message, name, '--pin')) == 1 and not hub.requests
    push(name)
    script = tmp_path / 'load.py'
    script.write_text(
        f"import timm, torch; m = timm.create_model('hf-hub:timm-sharesnet/{name}', pretrained=True).eval()\n"
        'print(m(torch.ones(1, 1, 32, 32)).tolist())'
    )
    code, out, _ = run(script=script, token=None, cwd=tmp_path)
    with torch.inference_mode():
        expected = model(torch.ones(1, 1, 32, 32))
    assert code == 0 and torch.allclose(torch.tensor(json.loads(out)), expected)


def test_mistyped_name_gets_the_nearest_ones(run, hub):
    assert 'did you mean sharesnet164_cifar' in run('sharesnet146_cifar.cpu_c10')[2][0]
    assert run('sharesnet164_cifar.cpi_c10')[2][0].endswith(f'did you mean {NAME}?')


# The pin


def test_pin_is_refused_for_another_endpoint_or_without_push(run, hub):
    for arguments, message in {
        ('--push', '--pin'): f'only, not for timm-sharesnet on {hub.endpoint}',
        ('--pin',): 'needs --push',
    }.items():
        code, _, err = run(NAME, *arguments)
        assert code == 2 and len(err) == 1 and message in err[0]
    assert not hub.requests


def take_for_the_real_hub(project, hub):
    """Let a copy of publish.py do so with the stand-in."""
    path, constant = project / 'hub' / 'publish.py', 'PINNED_ENDPOINT = '
    edit(path, f"{constant}'https://huggingface.co'", f'{constant}{hub.endpoint!r}')


def test_push_with_pin_writes_the_verified_commit(push, fails, hub, project):
    take_for_the_real_hub(project, hub)
    pins = project / 'timm_sharesnet' / 'weights.json'
    before = json.loads(pins.read_text())
    hub.fail('GET', '/tree/', 503, 99)
    fails('', NAME, '--pin')
    assert json.loads(pins.read_text()) == before
    hub.heal()
    push(NAME, '--pin')
    fails(f'--pin is for timm-sharesnet on {hub.endpoint} only, not for me', NAME, '--pin', '--namespace', 'me')
    after = json.loads(pins.read_text())
    pin = {'repo': REPO, 'revision': hub.repos[REPO].head.oid}
    assert after == before | {NAME: before[NAME] | pin}


# The cards

CARDS = sorted(path for path in (ROOT / 'hub').glob('*/README.md') if (path.parent / 'model.safetensors').is_file())


@pytest.mark.parametrize('card', CARDS, ids=lambda path: path.parent.name)
def test_snippets_of_the_card_run(run, hub, tmp_path, card):
    """Without the pip line, on an image of the package that the model knows, from an empty cache; ONNX as cloned."""
    name, text = card.parent.name, card.read_text()
    namespace = re.search(r'hf-hub:([\w.-]+)/', text)[1]
    hub.create(f'{namespace}/{name}', read_files(card.parent))
    sample = json.loads((ROOT / 'hub' / 'manifest.json').read_text())[name]['sample']
    sheet, wrong = (sample['images'], sample['wrong']) if sample else ('cifar10_test_1000', [])
    i = next(i for i in range(1000) if i not in wrong)
    with Image.open(ROOT / 'tests' / 'data' / f'{sheet}.webp') as image:
        x, y = 32 * (i % (image.width // 32)), 32 * (i // (image.width // 32))
        image.convert('RGB').crop((x, y, x + 32, y + 32)).save(tmp_path / 'image.png')
    for file in ('config.json', 'onnx'):
        (tmp_path / file).symlink_to(card.parent / file)
    codes = snippets(text)
    outputs = []
    for number, code in enumerate(codes):
        pip, _, code = code.partition('\n')
        assert pip == f'# pip install {"onnxruntime timm" if "onnx" in code else "timm-sharesnet"}'
        script = tmp_path / f'snippet{number}.py'
        script.write_text(code)
        status, out, err = run(script=script, token=None, cwd=tmp_path)
        assert status == 0, err
        outputs.append(out.splitlines())
    classes, features, embedding, label = outputs
    assert len(classes) == 5 and all(re.match(r'\d+\.\d% ', line) for line in classes)
    if sample:
        meta = json.loads((ROOT / 'tests' / 'data' / f'{sheet}.json').read_text())
        assert classes[0].endswith(f'% {meta["classes"][meta["labels"][i]]}')
        assert label == [meta['classes'][meta['labels'][i]]]
    for lines, code in zip((features, embedding), codes[1:3], strict=True):
        assert ', '.join(lines) == re.search(r'print\(tuple\(.*  # (.*)', code)[1]


def test_transformers_preprocesses_as_timm_does(run, hub, tmp_path):
    """From the Hub, where it looks at preprocessor_config.json first, which is for transformers.js."""
    hub.create(REPO, read_files(ROOT / 'hub' / NAME))
    script = tmp_path / 'script.py'
    script.write_text(f"""
import transformers
processor = transformers.pipeline('image-classification', model='{REPO}').image_processor
print(type(processor).__name__, processor.data_config['interpolation'])
""")
    status, out, err = run(script=script, token=None, cwd=tmp_path)
    assert (status, out) == (0, 'TimmWrapperImageProcessor bicubic\n'), err


@pytest.mark.parametrize('card', CARDS, ids=lambda path: path.parent.name)
def test_metadata_of_the_card_is_complete(card):
    data = yaml.safe_load(card.read_text().split('---\n')[1])
    keys = 'license library_name pipeline_tag datasets tags metrics'.split()
    assert all(data[key] for key in keys)
    entry = json.loads((ROOT / 'hub' / 'manifest.json').read_text())[card.parent.name]
    if entry['accuracy']:
        metrics = data['model-index'][0]['results'][0]['metrics']
        assert [m['value'] * 100 for m in metrics] == pytest.approx(
            [entry['accuracy']['top1'], entry['accuracy']['top5']]
        )
