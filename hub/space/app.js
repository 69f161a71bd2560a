/** The page: from an image that somebody gives to what the nets say of it. */
import { Failure } from './failure.js';
import { decode, normalize, prepare } from './image.js';
import { loadSettings, open } from './net.js';

const BEST = 3; // classes that are shown
const $ = (id) => document.getElementById(id);
const percent = (p) => (p < 0.001 ? '< 0.1 %' : p > 0.999 ? '> 99.9 %' : `${(100 * p).toFixed(1)} %`);
const megabytes = (bytes) => `${(bytes / 1e6).toPrecision(3)} MB`;
const called = (net) => (net.shared ? 'ShaResNet' : 'Unshared twin');

let settings;
let values; // of the image, as the nets take it
let turn = 0; // of the image: what was begun for one before it is dropped
const opened = new Set(); // nets that see each new image
const rows = new Map(); // net -> where its answer stands

/** Make an element. */
function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

// Images

/** Classify an image that `read` gives as a file, of a sample's button or not. */
async function show(read, sample) {
  const mine = ++turn;
  const current = () => mine === turn;
  fail();
  wait('Reading the image');
  try {
    await start();
    const bitmap = await decode(await read());
    const pixels = prepare(bitmap, settings.input);
    bitmap.close();
    if (!current()) return;
    draw(pixels);
    for (const button of $('samples').children) button.ariaPressed = String(button === sample);
    values = normalize(pixels, settings.input);
    const [first, ...others] = settings.nets;
    if (!opened.has(first)) wait(`Loading the net, ${megabytes(first.bytes)}, and its runtime`);
    const answer = await classify(first);
    if (!current()) return;
    tell(answer);
    for (const net of others.filter((each) => opened.has(each))) {
      rows.get(net)(await classify(net));
    }
  } catch (error) {
    if (current()) fail(error, () => show(read, sample));
  } finally {
    if (current()) wait();
  }
}

async function classify(net) {
  const [image, mine] = [values, turn];
  const { bytes, classify } = await open(net);
  await new Promise((resolve) => setTimeout(resolve)); // let the browser draw first: the net keeps it busy
  const answer = { ...(await classify(image)), bytes };
  opened.add(net);
  answer.best = settings.data.labels
    .map((label, i) => ({ label, p: answer.probabilities[i] }))
    .sort((a, b) => b.p - a.p)
    .slice(0, BEST);
  if (mine === turn) rows.get(net)(answer);
  return answer;
}

function draw(pixels) {
  const size = settings.input.size;
  Object.assign($('seen'), { width: size, height: size, hidden: false });
  $('seen').getContext('2d').putImageData(new ImageData(pixels, size), 0, 0);
  $('caption').hidden = false;
  $('hint').hidden = true;
  $('seen').scrollIntoView({ block: 'nearest' });
}

// What is told

function tell({ best, milliseconds, bytes }) {
  $('best').replaceChildren(
    ...best.map(({ label, p }) => {
      const bar = make('span', { className: 'bar', ariaHidden: 'true' });
      bar.style.setProperty('--part', p);
      return make('li', {}, make('span', { textContent: label }), make('span', { textContent: percent(p) }), bar);
    }),
  );
  $('time').textContent = `${milliseconds.toFixed(0)} ms`;
  $('net-bytes').textContent = megabytes(bytes.net);
  $('runtime-bytes').textContent = megabytes(bytes.runtime);
  $('welcome').hidden = true;
  $('result').hidden = false;
  $('status').textContent = best.map(({ label, p }) => `${label} ${percent(p)}`).join(', ');
}

function wait(what = '') {
  if (what) $('status').textContent = what;
  $('busy').hidden = !what;
  $('busy').textContent = what;
  $('told').ariaBusy = String(Boolean(what));
  $('told').classList.toggle('waiting', Boolean(what));
}

/** Say what failed and what to do, or take back what was said. */
function fail(error, again) {
  $('error').replaceChildren();
  $('told').classList.toggle('failed', Boolean(error));
  if (!error) return;
  $('status').textContent = '';
  const { title, advice } = explain(error);
  $('error').append(make('p', {}, make('strong', { textContent: title }), ` ${advice}`));
  if (error.again) {
    const button = make('button', { type: 'button', textContent: 'Try again' });
    button.addEventListener('click', again);
    $('error').append(button);
  }
  $('error').scrollIntoView({ block: 'nearest' });
}

function explain(error) {
  if (error instanceof Failure) return { title: error.message, advice: error.advice };
  console.error(error);
  return { title: 'Something went wrong.', advice: `Reload the page. (${error.message ?? error})` };
}

// The page itself

/** Fill in what is known of the nets, once. */
async function start() {
  if (settings) return;
  const found = await loadSettings();
  if (settings) return;
  settings = found;
  const { data, input, nets, repo, name, samples } = settings;
  $('labels').textContent = `${data.labels.slice(0, -1).join(', ')} and ${data.labels.at(-1)}`;
  $('px').textContent = `${input.size} × ${input.size} pixels`;
  $('caption').textContent = `What the net sees: ${input.size} × ${input.size} pixels`;
  Object.assign($('repo'), { textContent: name, href: `https://huggingface.co/${repo}` });
  $('samples').append(...samples.map(showSample));
  const [shared, twin] = [true, false].map((s) => nets.find((net) => net.shared === s).parameters);
  const count = (n) => n.toLocaleString('en');
  $('parameters').textContent = `Sharing saves ${Math.round(100 * (1 - shared / twin))} % of the parameters: there are ${count(shared)}, not ${count(twin)}.`;
  const largest = Math.max(...nets.map((net) => net.bytes));
  for (const kind of new Set(nets.map((net) => net.kind))) {
    $('nets').append(showNets(kind, nets.filter((net) => net.kind === kind), largest));
  }
  $('accuracy').textContent = tellAccuracy(nets, data);
}

function tellAccuracy(nets, data) {
  const known = nets.filter((net) => net.shared && net.top1);
  const told = known.map((net) => `${net.top1} % in ${net.kind}`).join(', ');
  return told && `Right of the ${data.images.toLocaleString('en')} test images of ${data.name}: ${told}.`;
}

function showSample({ file, label }) {
  const image = make('img', { src: file, alt: '', width: 32, height: 32 });
  const button = make('button', { type: 'button', className: 'sample', ariaPressed: 'false' }, image, make('span', { textContent: label }));
  button.addEventListener('click', () => show(() => download(file), button));
  return button;
}

async function download(file) {
  try {
    const response = await fetch(file);
    if (response.ok) return await response.blob();
  } catch {
    // told below
  }
  throw new Failure('The sample could not be loaded.', 'Are you online?', true);
}

/** Nets of one precision: each with its size, and a button that runs it. */
function showNets(kind, nets, largest) {
  const smaller = Math.round(100 * (1 - nets[0].bytes / nets[1].bytes));
  const list = make('ul', {}, ...nets.map((net) => showNet(net, largest)));
  return make('div', { className: 'card nets' }, make('h3', { textContent: `${kind}: ${smaller} % smaller` }), list);
}

function showNet(net, largest) {
  const bar = make('span', { className: net.shared ? 'bar shared' : 'bar', ariaHidden: 'true' });
  bar.style.setProperty('--part', net.bytes / largest);
  const run = make('button', { type: 'button', textContent: 'Run', ariaLabel: `Run: ${called(net)}, ${net.kind}, ${megabytes(net.bytes)}` });
  const answer = make('p', { className: 'answer', role: 'status' });
  rows.set(net, ({ best, milliseconds }) => {
    answer.className = 'answer';
    answer.textContent = `${best[0].label} ${percent(best[0].p)}, ${milliseconds.toFixed(0)} ms`;
  });
  run.addEventListener('click', async () => {
    try {
      answer.className = 'answer busy';
      answer.textContent = opened.has(net) ? 'Running' : 'Loading';
      if (!values) await show(() => download(settings.samples[0].file), $('samples').firstChild);
      if (values) await classify(net);
      else answer.replaceChildren();
    } catch (error) {
      const { title, advice } = explain(error);
      answer.className = 'answer wrong';
      answer.textContent = `${title} ${advice}`;
    }
  });
  const who = make('p', { className: 'who' }, make('strong', { textContent: called(net) }));
  who.append(make('span', { className: 'small', textContent: ` ${net.kernels} kernels of 3×3` }));
  const size = make('p', { className: 'size' }, bar, make('span', { textContent: megabytes(net.bytes) }));
  return make('li', {}, who, size, run, answer);
}

// What people do

$('choose').addEventListener('click', () => $('file').click());
$('file').addEventListener('change', () => {
  const [file] = $('file').files;
  $('file').value = ''; // so that the same file can be chosen again
  if (file) show(() => file);
});

/** The image among what was dropped or pasted. */
function take(data, how) {
  const [file] = data.files;
  show(() => {
    if (file) return file;
    throw new Failure(`There is no image in what you ${how}.`, 'Save the image to a file first, and take that.');
  });
}

document.addEventListener('paste', (event) => take(event.clipboardData, 'pasted'));
for (const [name, over] of Object.entries({ dragover: true, dragleave: false, drop: false })) {
  document.addEventListener(name, (event) => {
    event.preventDefault();
    document.body.classList.toggle('dragging', over);
    if (name === 'drop') take(event.dataTransfer, 'dropped');
  });
}

const CAMERA = {
  NotAllowedError: 'Allow it for this page in the settings of the browser.',
  NotFoundError: 'None was found. Choose an image in its place.',
  NotReadableError: 'Another program may be using it. Close that, and try again.',
};

$('camera').addEventListener('click', async () => {
  try {
    fail();
    if (!navigator.mediaDevices) throw new Failure('There is no camera.', 'Browsers give it to pages over https alone.');
    $('video').srcObject = await navigator.mediaDevices.getUserMedia({ video: { facingMode: 'environment' } });
    $('viewfinder').showModal();
  } catch (error) {
    const advice = CAMERA[error.name];
    fail(advice ? new Failure('There is no picture from the camera.', advice) : error);
  }
});
$('take').addEventListener('click', () => {
  const { videoWidth: width, videoHeight: height } = $('video');
  if (!width) return; // there is no picture yet
  const canvas = Object.assign(document.createElement('canvas'), { width, height });
  canvas.getContext('2d').drawImage($('video'), 0, 0);
  $('viewfinder').close();
  show(() => new Promise((resolve) => canvas.toBlob(resolve)));
});
$('close').addEventListener('click', () => $('viewfinder').close());
$('viewfinder').addEventListener('close', () => {
  for (const track of $('video').srcObject.getTracks()) track.stop();
});

/** Have the net there before somebody wants it, unless they pay for what they load. */
async function prepareNet() {
  try {
    fail();
    await start();
    if (!navigator.connection?.saveData) await open(settings.nets[0]);
  } catch (error) {
    if (!turn) fail(error, prepareNet);
  }
}

prepareNet();
