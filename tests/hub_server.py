"""A stand-in for the Hugging Face Hub: enough of its API for the real `huggingface_hub` client to publish and load.

It proves that client, wire format, cache and timm work together, not what the Hub's own policy is (hub/README.md has
the list). It keeps repositories, commits and LFS objects in memory, knows tokens and namespaces, and fails on demand.
The id of a Space begins with `spaces/`.

    with HubServer() as hub:
        hub.tokens['hf_write'] = Token('me', orgs=['our-org'])
        hub.fail('POST', r'/commit/', Failure.LOST)  # the commit is made, its answer never arrives

`hub.requests` lists what was asked. LFS objects are served under another host name (localhost) than the endpoint's
(127.0.0.1), as the Hub does, and the client must have HF_HUB_DISABLE_XET=1.
"""

import base64
import contextlib
import enum
import fnmatch
import hashlib
import json
import re
import socket
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

GITATTRIBUTES = b''.join(
    b'*.%s filter=lfs diff=lfs merge=lfs -text\n' % ending for ending in (b'bin', b'onnx', b'safetensors')
)
SPACE = {'README.md': b'---\ntitle: New\nsdk: static\n---\n', 'index.html': b'', 'style.css': b''}  # a new one's files
COLORS = {'red', 'yellow', 'green', 'blue', 'indigo', 'purple', 'pink', 'gray'}
LICENSES = {'apache-2.0', 'mit', 'bsd-3-clause', 'cc-by-4.0', 'gpl-3.0', 'other', 'unknown'}


class Failure(enum.Enum):
    CUT = 'close the connection, do nothing'
    LOST = 'do as asked, then close the connection without an answer'
    HALF = 'send half of the answer, then close the connection'
    HANG = 'do nothing until the client gives up'


@dataclass
class Token:
    """Who a token belongs to; a read-only one (`role='read'`) may not write."""

    name: str
    orgs: list = field(default_factory=list)
    role: str = 'write'

    def may_write(self, namespace):
        return self.role == 'write' and namespace in (self.name, *self.orgs)


@dataclass
class Commit:
    title: str
    files: dict  # path -> Blob
    parent: str = ''
    oid: str = ''

    def __post_init__(self):
        content = repr((self.title, self.parent, sorted((p, b.oid) for p, b in self.files.items()), time.time_ns()))
        self.oid = hashlib.sha1(content.encode()).hexdigest()


@dataclass
class Blob:
    data: bytes
    lfs: bool = False

    @property
    def git_oid(self):
        data = self.pointer if self.lfs else self.data
        return hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest()

    @property
    def pointer(self):
        sha256 = hashlib.sha256(self.data).hexdigest()
        return f'version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(self.data)}\n'.encode()

    @property
    def oid(self):
        return hashlib.sha256(self.data).hexdigest() if self.lfs else self.git_oid


@dataclass
class Repo:
    private: bool
    commits: list  # of Commit, oldest first

    @property
    def head(self):
        return self.commits[-1]

    def commit(self, revision):
        oid = {'main': self.head.oid, 'HEAD': self.head.oid}.get(revision, revision)
        return next((c for c in self.commits if c.oid == oid), None)


class Refusal(Exception):
    """An answer of the Hub that is an error."""

    def __init__(self, status, message, code=None, **body):
        super().__init__(message)
        self.status, self.code, self.body = status, code, {'error': message, **body}


class HubServer:
    """The state of the stand-in, and its server in a thread."""

    def __init__(self):
        self._lock = threading.RLock()
        self.reset()

    def reset(self):
        """Forget everything."""
        self.repos = {}  # id -> Repo
        self.renamed = {}  # old id -> new id, redirected as the Hub does after a rename or transfer
        self.lfs = {}  # SHA-256 -> bytes
        self.tokens = {}  # token -> Token
        self.requests = []  # 'METHOD /path'
        self._failures = []  # [method, pattern, what, times]

    def __enter__(self):
        handler = type('Handler', (_Handler,), {'hub': self})
        self._server = ThreadingHTTPServer(('127.0.0.1', 0), handler)
        self._server.daemon_threads = True
        self.endpoint = f'http://127.0.0.1:{self._server.server_port}'
        self.storage = f'http://localhost:{self._server.server_port}'
        threading.Thread(target=self._server.serve_forever, kwargs={'poll_interval': 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def fail(self, method, pattern, what, times=1):
        """Make the next requests fail.

        Args:
            method: HTTP method.
            pattern: Regular expression searched in the path.
            what: A `Failure`, an HTTP status, or seconds (a float) to wait before answering.
            times: How many requests fail.
        """
        with self._lock:
            self._failures.append([method, pattern, what, times])

    def heal(self):
        """Forget the failures that are still to come."""
        with self._lock:
            self._failures.clear()

    def take_failure(self, method, path):
        with self._lock:
            for failure in self._failures:
                if failure[0] == method and re.search(failure[1], path) and failure[3] > 0:
                    failure[3] -= 1
                    return failure[2]
        return None

    def create(self, repo_id, files, private=False):
        """Put a repository there without the client: path -> bytes. Returns the commit."""
        blobs = {path: self._blob(path, data) for path, data in files.items()}
        first = Commit('initial commit', {'.gitattributes': Blob(GITATTRIBUTES)})
        commit = Commit('Add model', {**first.files, **blobs}, first.oid)
        self.repos[repo_id] = Repo(private, [first, commit])
        return commit.oid

    def _blob(self, path, data):
        if is_lfs(path, len(data)):
            self.lfs[hashlib.sha256(data).hexdigest()] = data
            return Blob(data, lfs=True)
        return Blob(data)


def is_lfs(path, size):
    patterns = [line.split()[0] for line in GITATTRIBUTES.decode().splitlines()]
    return size > 10 * 2**20 or any(fnmatch.fnmatch(path, pattern) for pattern in patterns)


def read_metadata(card):
    """The metadata of a card's text, None if it has none."""
    match = re.match(r'---\n(.*?)\n---\n', card, re.S)
    return yaml.safe_load(match[1]) if match else None


def metadata_errors(card, space=False):
    """What the Hub's validator says to the metadata of a card: of its rules, those that a card of ours could break."""
    try:
        data = read_metadata(card) or {}
    except yaml.YAMLError as e:
        return [f'YAML: {e}']
    errors = []
    if space:
        if data.get('sdk') not in ('static', 'gradio', 'docker'):
            errors.append('"sdk" must be one of gradio, docker, static')
        if not {data.get('colorFrom'), data.get('colorTo')} <= COLORS:
            errors.append(f'"colorFrom" and "colorTo" must be of {sorted(COLORS)}')
        if not data.get('emoji', '').strip():
            errors.append('"emoji" is required')
        if len(data.get('short_description', '')) > 60:
            errors.append('"short_description" must have at most 60 characters')
    if data.get('license', 'unknown') not in LICENSES:
        errors.append(f'"license" must be one of {sorted(LICENSES)}')
    for dataset in data.get('datasets', []):
        if not re.fullmatch(r'[\w.-]+(/[\w.-]+)?', str(dataset)):
            errors.append(f'"datasets" with value "{dataset}" is not valid')
    for model in data.get('model-index', []):
        for result in model.get('results', [{}]):
            if not (model.get('name') and result.get('task', {}).get('type') and result.get('dataset', {}).get('name')):
                errors.append('"model-index[0]" needs a name, and its results task and dataset')
            if not all({'type', 'value'} <= metric.keys() for metric in result.get('metrics', [{}])):
                errors.append('"model-index[0].results[0].metrics[0]" needs type and value')
    return errors


API = r'/api/(?:models/)?(?P<id>(?:spaces/)?[^/]+/[^/]+)'
ID = r'/(?P<id>(?:spaces/)?[^/]+/[^/]+)'


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    hub: HubServer

    ROUTES = [
        ('POST', r'/api/repos/create', 'create_repo'),
        ('DELETE', r'/api/repos/delete', 'delete_repo'),
        ('POST', r'/api/validate-yaml', 'validate_yaml'),
        ('GET', r'/api/whoami-v2', 'whoami'),
        ('POST', API + r'/preupload/(?P<rev>[^/]+)', 'preupload'),
        ('POST', API + r'/commit/(?P<rev>[^/]+)', 'commit'),
        ('POST', API + r'/paths-info/(?P<rev>[^/]+)', 'paths_info'),
        ('PUT', API + r'/settings', 'settings'),
        ('GET', API + r'/tree/(?P<rev>[^/]+)(/(?P<path>.+))?', 'tree'),
        ('GET', API + r'(/revision/(?P<rev>[^/]+))?', 'repo_info'),
        ('POST', ID + r'\.git/info/lfs/objects/batch', 'lfs_batch'),
        ('POST', ID + r'\.git/info/lfs/verify', 'lfs_verify'),
        ('PUT', r'/lfs/(?P<oid>[0-9a-f]{64})', 'lfs_put'),
        ('GET', r'/lfs/(?P<oid>[0-9a-f]{64})', 'lfs_get'),
        ('HEAD', ID + r'/resolve/(?P<rev>[^/]+)/(?P<path>.+)', 'resolve'),
        ('GET', ID + r'/resolve/(?P<rev>[^/]+)/(?P<path>.+)', 'resolve'),
    ]

    def log_message(self, *_):
        pass

    def do(self):
        """Answer one request: read it whole, find its route, fail if told to."""
        url = urlsplit(self.path)
        path, self.query = unquote(url.path), parse_qs(url.query)
        self.hub.requests.append(f'{self.command} {path}')
        body = self.read_body()
        failure = self.hub.take_failure(self.command, path)
        if failure is Failure.HANG:
            self.rfile.read(1)  # returns when the client is gone
        if failure in (Failure.CUT, Failure.HANG):
            return self.cut()
        if isinstance(failure, float):
            time.sleep(failure)
        try:
            if isinstance(failure, int):
                raise Refusal(failure, 'the stand-in was told to fail')
            with self.hub._lock:
                status, headers, data = self.route(path, body)
        except Refusal as e:
            status, headers, data = e.status, {'X-Error-Message': str(e)}, e.body
            if e.code:
                headers['X-Error-Code'] = e.code
        if failure is Failure.LOST:
            return self.cut()
        with contextlib.suppress(ConnectionError):  # the client may be gone
            self.answer(status, headers, data, half=failure is Failure.HALF)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do

    def read_body(self):
        if self.headers.get('Transfer-Encoding') == 'chunked':
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b''.join(chunks)
        return self.rfile.read(int(self.headers.get('Content-Length') or 0))

    def cut(self):
        self.close_connection = True
        with contextlib.suppress(OSError):  # the client may be gone
            self.connection.shutdown(socket.SHUT_RDWR)

    def answer(self, status, headers, data, half=False):
        if not isinstance(data, bytes):
            data = json.dumps(data).encode()
            headers = {'Content-Type': 'application/json', **headers}
        self.send_response(status)
        for name, value in {'Content-Length': len(data), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(data[: len(data) // 2] if half else data)
        if half:
            self.wfile.flush()
            self.cut()

    def route(self, path, body):
        for method, pattern, name in self.ROUTES:
            match = re.fullmatch(pattern, path)
            if method == self.command and match:
                arguments = {k: v for k, v in match.groupdict().items() if v}
                new = self.hub.renamed.get(arguments.get('id'))
                if new:
                    return 307, {'Location': self.path.replace(arguments['id'], new, 1)}, b''
                if name not in ('lfs_put', 'lfs_get', 'lfs_verify', 'resolve'):
                    body = body if name == 'commit' else self.json(body)
                return getattr(self, name)(body, **arguments)
        raise Refusal(404, f'the stand-in has no route {self.command} {path}')

    def json(self, body):
        if self.headers.get('Content-Type', '').startswith('application/x-www-form-urlencoded'):
            return parse_qs(body.decode())
        return json.loads(body) if body else {}

    # Who asks, and for what

    def user(self, needed=False):
        scheme, _, token = self.headers.get('Authorization', '').partition(' ')
        if not scheme:
            if needed:
                raise Refusal(401, 'Invalid username or password.')
            return None
        if token not in self.hub.tokens:
            raise Refusal(401, 'Invalid credentials in Authorization header')
        return self.hub.tokens[token]

    def repo(self, repo_id, write=False):
        user, repo = self.user(needed=write), self.hub.repos.get(repo_id)
        namespace = repo_id.split('/')[-2]
        visible = repo and (not repo.private or (user and namespace in (user.name, *user.orgs)))
        if not visible:  # the Hub does not tell private from missing
            raise Refusal(404 if user else 401, 'Repository not found', 'RepoNotFound')
        if write and not user.may_write(namespace):
            raise Refusal(403, f'you have no write access to {repo_id}')
        return repo

    def revision(self, repo, revision):
        commit = repo.commit(revision)
        if not commit:
            raise Refusal(404, f'Invalid rev id: {revision}', 'RevisionNotFound')
        return commit

    # Repositories

    def create_repo(self, body):
        user = self.user(needed=True)
        namespace = body.get('organization') or user.name
        kind = body.get('type', 'model')
        repo_id = self.full_id(body, namespace)
        if not user.may_write(namespace):
            raise Refusal(403, f"You don't have the rights to create a {kind} under the namespace {namespace}")
        url = f'{self.hub.endpoint}/{repo_id}'
        if repo_id in self.hub.repos:
            raise Refusal(409, f'You already created this {kind} repo', url=url)
        private = body.get('private') or body.get('visibility') == 'private'
        files = {'.gitattributes': GITATTRIBUTES, **(SPACE if kind == 'space' else {})}
        first = Commit('initial commit', {path: Blob(data) for path, data in files.items()})
        self.hub.repos[repo_id] = Repo(bool(private), [first])
        return 200, {}, {'url': url, 'name': repo_id, 'id': repo_id}

    def full_id(self, body, namespace):
        if body.get('type') != 'space':
            return f'{namespace}/{body["name"]}'
        if self.command == 'POST' and body.get('sdk') != 'static':
            raise Refusal(400, '"sdk" is required')
        return f'spaces/{namespace}/{body["name"]}'

    def delete_repo(self, body):
        repo_id = self.full_id(body, body.get('organization') or self.user().name)
        self.repo(repo_id, write=True)
        del self.hub.repos[repo_id]
        return 200, {}, b''

    def settings(self, body, id):
        repo = self.repo(id, write=True)
        repo.private = body.get('private', body.get('visibility') == 'private')
        return 200, {}, {'private': repo.private}

    def whoami(self, _):
        user = self.user(needed=True)
        orgs = [{'type': 'org', 'name': org, 'roleInOrg': 'write'} for org in user.orgs]
        token = {'displayName': 'test', 'role': user.role}
        return 200, {}, {'type': 'user', 'name': user.name, 'orgs': orgs, 'auth': {'accessToken': token}}

    def repo_info(self, _, id, rev='main'):
        repo, name = self.repo(id), id.removeprefix('spaces/')
        commit = self.revision(repo, rev)
        files = [{'rfilename': path} for path in commit.files]
        readme = commit.files.get('README.md')
        data = read_metadata(readme.data.decode()) if readme else None
        info = {'_id': '0', 'id': name, 'modelId': name, 'sha': commit.oid, 'private': repo.private, 'siblings': files}
        return 200, {}, {**info, 'tags': [], 'downloads': 0, 'cardData': data, 'sdk': (data or {}).get('sdk')}

    # Commits

    def validate_yaml(self, body):
        errors = metadata_errors(body['content'], body.get('repoType') == 'space')
        answer = {'errors': [{'message': e} for e in errors], 'warnings': []}
        return (400 if errors else 200), {}, answer

    def preupload(self, body, id, rev):
        commit = self.revision(self.repo(id, write=True), rev)
        files = []
        for file in body['files']:
            path = file['path']
            oid = commit.files[path].oid if path in commit.files else None
            mode = 'lfs' if is_lfs(path, file['size']) else 'regular'
            files.append({'path': path, 'uploadMode': mode, 'shouldIgnore': False, 'oid': oid})
        return 200, {}, {'files': files}

    def commit(self, body, id, rev):
        repo = self.repo(id, write=True)
        parent = self.revision(repo, rev)
        if parent is not repo.head:
            raise Refusal(400, 'commits are made on a branch')
        files, title = dict(parent.files), ''
        for line in body.splitlines():
            operation = json.loads(line)
            key, value = operation['key'], operation['value']
            if key == 'header':
                title = value['summary']
                if value.get('parentCommit') not in (None, parent.oid):
                    raise Refusal(412, 'A commit has happened since. Please refresh and try again.')
            elif key == 'file':
                files[value['path']] = Blob(base64.b64decode(value['content']))
            elif key == 'lfsFile':
                if value['oid'] not in self.hub.lfs:
                    raise Refusal(400, 'LFS pointer pointed to a file that does not exist')
                files[value['path']] = Blob(self.hub.lfs[value['oid']], lfs=True)
            elif key == 'deletedFile':
                if value['path'] not in files:
                    raise Refusal(404, "A file with this name doesn't exist", 'EntryNotFound')
                del files[value['path']]
        readme, space = files.get('README.md'), id.startswith('spaces/')
        errors = metadata_errors(readme.data.decode(), space) if readme else []
        if errors:
            raise Refusal(400, '; '.join(errors))
        repo.commits.append(Commit(title, files, parent.oid))
        url = f'{self.hub.endpoint}/{id}/commit/{repo.head.oid}'
        return 200, {}, {'success': True, 'commitOid': repo.head.oid, 'commitUrl': url, 'hookOutput': ''}

    def entry(self, path, blob):
        entry = {'type': 'file', 'path': path, 'size': len(blob.data), 'oid': blob.git_oid}
        if blob.lfs:
            entry['lfs'] = {'oid': blob.oid, 'size': len(blob.data), 'pointerSize': len(blob.pointer)}
        return entry

    def tree(self, _, id, rev, path=''):
        commit = self.revision(self.repo(id), rev)
        files = [self.entry(p, b) for p, b in commit.files.items() if p.startswith(path)]
        folders = {p.rpartition('/')[0] for p in commit.files if '/' in p and p.startswith(path)}
        return 200, {}, files + [{'type': 'directory', 'path': p, 'size': 0, 'oid': '0' * 40} for p in folders]

    def paths_info(self, body, id, rev):
        commit = self.revision(self.repo(id), rev)
        return 200, {}, [self.entry(p, b) for p, b in commit.files.items() if p in body['paths']]

    # Files

    def resolve(self, _, id, rev, path):
        commit = self.revision(self.repo(id), rev)
        headers = {'X-Repo-Commit': commit.oid}
        blob = commit.files.get(path)
        if not blob:
            raise Refusal(404, 'Entry not found', 'EntryNotFound')
        if not blob.lfs:
            return 200, {**headers, 'ETag': f'"{blob.oid}"'}, blob.data
        linked = {'X-Linked-Etag': f'"{blob.oid}"', 'X-Linked-Size': len(blob.data)}
        return 302, {**headers, **linked, 'Location': f'{self.hub.storage}/lfs/{blob.oid}'}, b''

    def lfs_batch(self, body, id):
        self.repo(id, write=True)
        objects = []
        for wanted in body['objects']:
            if wanted['oid'] not in self.hub.lfs:
                upload = {'href': f'{self.hub.storage}/lfs/{wanted["oid"]}'}
                verify = {'href': f'{self.hub.endpoint}/{id}.git/info/lfs/verify'}
                wanted = {**wanted, 'actions': {'upload': upload, 'verify': verify}}
            objects.append(wanted)
        return 200, {}, {'transfer': 'basic', 'objects': objects}

    def lfs_put(self, body, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(400, 'the content does not have this SHA-256')
        self.hub.lfs[oid] = body
        return 200, {}, b''

    def lfs_verify(self, body, id):
        self.repo(id, write=True)
        wanted = json.loads(body)
        if len(self.hub.lfs.get(wanted['oid'], b'')) != wanted['size']:
            raise Refusal(404, 'not uploaded')
        return 200, {}, {}

    def lfs_get(self, _, oid):
        data, headers = self.hub.lfs[oid], {'ETag': f'"{oid}"', 'Accept-Ranges': 'bytes'}
        match = re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers.get('Range', ''))
        if not match:
            return 200, headers, data
        start, end = int(match[1]), min(int(match[2] or len(data) - 1), len(data) - 1)
        headers['Content-Range'] = f'bytes {start}-{end}/{len(data)}'
        return 206, headers, data[start : end + 1]
