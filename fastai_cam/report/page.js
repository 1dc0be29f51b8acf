(() => {
'use strict';
const $ = id => document.getElementById(id);
const F = JSON.parse($('facts').textContent);
const items = F.items, kind = F.kind, M = F.models.length, asks = F.maps.asked;
const methods = [...new Set(F.models.flatMap(model => model.methods))];
const palettes = Object.fromEntries(Object.entries(F.maps.palettes).map(([name, text]) => [name, bytes(text)]));
const DIFFERENCE = asks.length, canDiffer = kind === 'classes';
const state = {ask: 0, method: 0, colours: F.maps.signed ? 'signed' : F.maps.palette, opacity: 70,
  search: '', status: 'all', cls: '', sort: 'loss', sure: 0, loss: 0, pair: null};
let order = [], active = 0, current = -1, isPrinting = false;

// -- small things

const inWords = value => {
  if (value === null) return 'not known';
  if (kind === 'classes') return F.names[value];
  if (!value.length) return 'none';
  const parts = kind === 'labels' ? value.map(c => F.names[c]) : value.map(x => figures(x));
  return parts.slice(0, 5).join('; ') + (parts.length > 5 ? `; +${parts.length - 5}` : '');
};
const has = (value, c) => Array.isArray(value) ? value.includes(c) : value === c;

// -- maps: a few numbers, coloured here; a block is in the page once the browser has read so far

const blockOf = i => { const found = $(`i${i}`); return found && (found.nextSibling || document.readyState !== 'loading') ? JSON.parse(found.textContent) : null; };
const entry = (view, ask, method) => {
  const found = view.maps.find(one => one.ask === ask && one.method === methods[method]) || view.maps.find(one => one.ask === ask);
  return !found ? null : found.same === undefined ? found : {...view.maps[found.same], text: found.text};
};
function shownMap(view) {
  const first = entry(view, state.ask === DIFFERENCE ? 0 : state.ask, state.method) || entry(view, 0, 0);
  if (!first || !first.map) return first && {text: first.text, none: true};
  const found = {w: first.map.w, h: first.map.h, values: numbers(first.map), full: first.full, text: first.text, signed: state.colours === 'signed'};
  if (state.ask !== DIFFERENCE) return found;
  const second = entry(view, 1, state.method);
  if (!second || !second.map) return {...found, text: 'the label is not known', none: true};
  const others = numbers(second.map);
  return {...found, values: found.values.map((x, i) => x - others[i]), text: `${first.text} − ${second.text}`, signed: true};
}
function draw(canvas, view) {
  const map = shownMap(view);
  if (!map || map.none) clearMap(canvas);
  else paintMap(canvas, map, palettes[map.signed ? 'signed' : state.colours]);
  return map;
}
function pictureOf(block, m, box) {
  const picture = block.views[m].picture || block.views[0].picture, wide = picture.w/picture.h;
  const image = make('img', {alt: '', src: `data:${picture.type};base64,${picture.data}`, decoding: isPrinting ? 'sync' : 'async', draggable: 'false'});
  const found = make('span', {class: 'pic'}, image, make('canvas', {'aria-hidden': 'true', width: 1, height: 1}));
  found.style.setProperty('--wide', wide);
  if (!box) return found; // as large as its frame
  const width = Math.min(box.w, box.h*wide);
  found.style.width = `${width}px`;
  found.style.height = `${width/wide}px`;
  return found;
}

// -- which items, in which order

const sorts = {loss: ['largest loss first', (a, b) => down(a, b, answer => answer.loss)],
  '-loss': ['smallest loss first', (a, b) => down(a, b, answer => answer.loss === null ? null : -answer.loss)],
  sure: ['most sure first', (a, b) => down(a, b, answer => answer.probability)],
  '-sure': ['least sure first', (a, b) => down(a, b, answer => answer.probability === null ? null : -answer.probability)],
  label: ['by label', (a, b) => inWords(items[a].label).localeCompare(inWords(items[b].label)) || a - b],
  key: ['by path', (a, b) => items[a].key.localeCompare(items[b].key, undefined, {numeric: true})]};
if (kind === 'values') { delete sorts.sure; delete sorts['-sure']; delete sorts.label; }
if (M > 1) sorts.gap = ['largest difference in loss', (a, b) => gap(items[b]) - gap(items[a])];
const gap = item => item.answers.some(answer => answer.loss === null) ? -1 : Math.abs(item.answers[0].loss - item.answers[1].loss);
const down = (a, b, of) => {
  const [x, y] = [of(items[a].answers[0]), of(items[b].answers[0])];
  return (y === null ? -Infinity : y) - (x === null ? -Infinity : x) || a - b;
};
const statuses = M > 1
  ? kind === 'values' ? {all: 'All', better: 'Better', worse: 'Worse'} : {all: 'All', better: 'Better', worse: 'Worse', 'both wrong': 'Both wrong', 'both right': 'Both right'}
  : kind === 'values' ? {all: 'All'} : {all: 'All', wrong: 'Wrong', right: 'Right'};
const isOf = (item, status) => status === 'all' || (M > 1 ? item.change === status : item.answers[0].right === (status === 'right'));
const texts = items.map(item => [item.key, inWords(item.label), ...item.answers.map(answer => inWords(answer.prediction))].map(text => plain(text.slice(0, 400))).join('\n'));

function passes(i) {
  const item = items[i], answer = item.answers[0];
  if (!isOf(item, state.status)) return false;
  if (state.cls !== '' && !has(item.label, +state.cls) && !item.answers.some(one => has(one.prediction, +state.cls))) return false;
  if (state.pair && !(item.label === state.pair.actual && item.answers.some(one => one.prediction === state.pair.predicted))) return false;
  if (state.sure > 0 && !(answer.probability >= state.sure/100)) return false;
  if (state.loss > 0 && !(answer.loss >= state.loss)) return false;
  return plain(state.search).split(/\s+/).every(word => texts[i].includes(word));
}
function select() {
  const before = order[active];
  order = items.map((_, i) => i).filter(passes).sort(sorts[state.sort][1]);
  active = Math.max(0, order.indexOf(before));
  const count = $('count');
  count.textContent = order.length === items.length ? `${items.length} pictures` : `${order.length} of ${items.length} pictures`;
  if (state.pair) {
    const clear = make('button', {type: 'button', class: 'chip'}, isolated(F.names[state.pair.actual], {}, 40), ' taken for ', isolated(F.names[state.pair.predicted], {}, 40), ' ✕');
    clear.addEventListener('click', () => { state.pair = null; select(); });
    count.append(clear);
  }
  $('nothing').hidden = order.length > 0;
  for (const li of shown.values()) li.remove();
  shown.clear();
  filled = '';
  layOut();
}

// -- the grid: only what is near the window is in the page

const grid = $('grid'), shown = new Map();
let columns = 1, tile = {w: 200, h: 260}, gapPx = 14, filled = '';
function measure() {
  const width = grid.clientWidth, least = M > 1 ? Math.min(340, width) : width < 480 ? 150 : 190;
  columns = Math.max(1, Math.floor((width + gapPx)/(least + gapPx)));
  const w = (width - gapPx*(columns - 1))/columns;
  tile = {w, h: (M > 1 ? (w - 3)/2 : w) + (M > 1 ? 84 : 62)};
}
function place(li, at) {
  li.style.width = `${tile.w}px`;
  li.style.height = `${tile.h}px`;
  li.style.transform = `translate(${(at % columns)*(tile.w + gapPx)}px, ${Math.floor(at/columns)*(tile.h + gapPx)}px)`;
}
function layOut() {
  measure();
  const rows = Math.ceil(order.length/columns);
  grid.style.height = rows ? `${rows*(tile.h + gapPx) - gapPx}px` : '0';
  for (const li of shown.values()) place(li, li.at);
  fill();
}
function fill() {
  const top = grid.getBoundingClientRect().top, step = tile.h + gapPx, spare = innerHeight;
  let first = Math.max(0, Math.floor((-top - spare)/step))*columns, last = Math.ceil((-top + innerHeight + spare)/step)*columns;
  if (isPrinting) [first, last] = [0, 200];
  last = Math.min(order.length, Math.max(last, first));
  const now = [first, last, active, columns, tile.w].join();
  if (now === filled) return; // nothing has come near, nothing has gone
  filled = now;
  const wanted = new Set(order.slice(first, last));
  for (const [i, li] of shown) if (!wanted.has(i) && !li.contains(document.activeElement)) { li.remove(); shown.delete(i); }
  let after = null;
  for (let at = last - 1; at >= first; at--) {
    const i = order[at];
    let li = shown.get(i);
    if (!li) {
      li = tileOf(i);
      shown.set(i, li);
      grid.insertBefore(li, after);
    }
    if (li.at !== at) {
      li.at = at;
      li.setAttribute('aria-posinset', at + 1);
      li.setAttribute('aria-setsize', order.length);
      place(li, at);
    }
    const stop = at === active ? 0 : -1;
    if (li.firstChild.tabIndex !== stop) li.firstChild.tabIndex = stop;
    after = li;
  }
  paint();
}
let isPaintDue = false;
function paintSoon(wait) { // once, however often it is asked for
  if (isPaintDue) return;
  isPaintDue = true;
  const go = () => { isPaintDue = false; paint(); };
  if (wait) setTimeout(go, wait); else requestAnimationFrame(go);
}
function paint() {
  const start = performance.now(), middle = innerHeight/2 - grid.getBoundingClientRect().top, step = tile.h + gapPx;
  const todo = [...shown].filter(([, li]) => !li.isPainted).map(([i, li]) => [Math.abs((Math.floor(li.at/columns) + .5)*step - middle), i, li]).sort((a, b) => a[0] - b[0]);
  let isWaiting = false;
  for (const [, i, li] of todo) { // what is seen comes first, and never so much that scrolling would halt
    if (performance.now() - start > 5 && !isPrinting) return paintSoon(0);
    const block = blockOf(i);
    if (!block) { isWaiting = true; continue; }
    li.isPainted = true;
    li.querySelectorAll('.frame').forEach((frame, m) => {
      const pic = pictureOf(block, m);
      draw(pic.lastChild, block.views[m]);
      frame.replaceChildren(pic);
    });
  }
  if (isWaiting) paintSoon(60);
}
function saidOf(item, answer, m) {
  const value = kind === 'values' ? `loss ${figures(answer.loss)}` : answer.probability === null ? '' : answer.probability.toFixed(2);
  return make('span', {class: 'line'}, markOf(answer.right), M > 1 ? make('span', {class: 'key', text: m + 1}) : null,
    make('span', {class: 'hidden', text: `${rightInWords(answer.right)} predicted `}), isolated(inWords(answer.prediction), {class: 'name'}), make('span', {class: 'value', text: value}));
}
function tileOf(i) {
  const item = items[i], said = make('span', {class: 'said'}, ...item.answers.map((answer, m) => saidOf(item, answer, m)));
  const loss = item.answers.map(answer => figures(answer.loss)).join(' | ');
  said.append(make('span', {class: 'line sub'}, make('span', {text: 'actual'}), isolated(inWords(item.label)),
    kind === 'values' ? null : make('span', {class: 'value', text: `loss ${loss}`})));
  const frames = make('span', {class: 'frames'}, ...item.answers.map(() => make('span', {class: 'frame'})));
  const button = make('button', {type: 'button', class: 'tile'}, frames, said);
  button.addEventListener('click', () => open(order.indexOf(i)));
  button.addEventListener('focus', () => { active = order.indexOf(i); for (const li of shown.values()) li.firstChild.tabIndex = li.firstChild === button ? 0 : -1; });
  return make('li', {}, button);
}
function repaint() {
  for (const [i, li] of shown) {
    const block = li.isPainted && blockOf(i);
    if (block) li.querySelectorAll('.pic canvas').forEach((canvas, m) => draw(canvas, block.views[m]));
  }
  if (current >= 0) showLarge();
}
function reach(at) {
  if (!order.length) return;
  active = Math.max(0, Math.min(order.length - 1, at));
  const top = grid.getBoundingClientRect().top + Math.floor(active/columns)*(tile.h + gapPx);
  const bar = getComputedStyle($('tools')).position === 'sticky' ? $('tools').offsetHeight + 8 : 8;
  if (top < bar) scrollBy(0, top - bar);
  else if (top + tile.h > innerHeight - 8) scrollBy(0, Math.min(top - bar, top + tile.h - innerHeight + 8));
  fill();
  const li = shown.get(order[active]);
  if (li) li.firstChild.focus({preventScroll: true});
}

// -- large

const large = $('large');
let stages = [];
function open(at) {
  current = at;
  large.showModal();
  showLarge();
  large.scrollTop = 0;
  $('large-title').focus();
}
function step(by) {
  if (current + by < 0 || current + by >= order.length) return;
  current += by;
  showLarge();
}
function captionOf(m, answer, map) {
  const name = M > 1 ? make('b', {}, isolated(F.models[m].name), ': ') : null;
  return make('figcaption', {}, name, map ? isolated(map.none ? 'no map' : `map of: ${map.text}`, {}, 260) : 'no map');
}
function showLarge() {
  const i = order[current], item = items[i], block = blockOf(i);
  if (!block) { setTimeout(() => { if (order[current] === i) showLarge(); }, 60); return; }
  $('large-place').textContent = `${current + 1} of ${order.length}`;
  $('large-title').replaceChildren(isolated(item.key, {}, 160));
  $('previous').disabled = current === 0;
  $('next').disabled = current === order.length - 1;
  const room = $('large-views').clientWidth, side = M > 1 && room > 500 ? (room - 16)/2 : room;
  const box = {w: side, h: Math.max(220, M > 1 ? innerHeight*.55 : innerHeight - 200)};
  $('large-views').replaceChildren(...item.answers.map((answer, m) => {
    const pic = pictureOf(block, m, box), map = draw(pic.lastChild, block.views[m]);
    return make('figure', {class: 'view'}, make('div', {class: 'stage'}, pic), captionOf(m, answer, map));
  }));
  $('large-facts').replaceChildren(factsOf(item), ...item.answers.filter(answer => answer.top.length > 1).map(topOf));
  $('large-like').hidden = !block.like;
  $('large-like').replaceChildren(...(block.like ? likesOf(block.like) : []));
  drawLegend();
}
function factsOf(item) {
  const list = make('dl'), line = (name, ...inside) => list.append(make('dt', {text: name}), make('dd', {}, ...inside));
  line('actual', isolated(inWords(item.label), {}, 240));
  item.answers.forEach((answer, m) => {
    const who = M > 1 ? `${m + 1}: ` : '';
    line(`${who}predicted`, markOf(answer.right), answer.right === null ? '' : ' ', isolated(inWords(answer.prediction), {}, 240), answer.right === null ? '' : ` (${rightInWords(answer.right)})`);
    if (answer.probability !== null) line(`${who}probability`, percent(answer.probability));
    line(`${who}loss`, figures(answer.loss));
  });
  if (M > 1 && item.change) line('compared', item.change);
  line('place in the set', String(item.position));
  return list;
}
function likeOf(one) {
  const {picture, name} = JSON.parse($(`t${one.at}`).textContent);
  const image = picture ? make('img', {alt: `training picture ${short(name)}`, title: short(name, 600), src: `data:${picture.type};base64,${picture.data}`, width: picture.w, height: picture.h}) : make('span', {class: 'lost', text: 'cannot be read'});
  return make('li', {}, image, isolated(name, {}, 40),
    make('span', {text: `alike ${one.alike.toFixed(2)}`}), one.says ? make('span', {class: 'doubt'}, '⚠ the model says ', isolated(one.says, {}, 40)) : null);
}
function likesOf(rows) {
  return [make('h3', {text: 'Training pictures most like it'}), ...rows.flatMap(row => [
    make('p', {}, 'labelled ', isolated(row.words, {}, 60), row.role ? ` (${row.role})` : null),
    row.none ? make('p', {class: 'meta'}, isolated(row.none, {}, 200)) : make('ul', {}, ...row.found.map(likeOf))])];
}
const meterOf = share => {
  const found = make('span', {class: 'meter', 'aria-hidden': 'true'}, make('span'));
  found.firstChild.style.width = `${100*share}%`;
  return found;
};
function topOf(answer, m) {
  const rows = answer.top.map(([c, p]) => make('tr', {}, make('td', {}, isolated(F.names[c], {}, 60)),
    make('td', {class: 'bar'}, meterOf(p)), make('td', {class: 'num', text: percent(p)})));
  return make('table', {}, make('caption', {}, 'Most probable', M > 1 ? make('span', {}, ' by ', isolated(F.models[m].name)) : null), make('tbody', {}, ...rows));
}
function drawLegend() {
  const signed = state.colours === 'signed' || state.ask === DIFFERENCE, context = $('legend').getContext('2d'), image = context.createImageData(256, 1);
  image.data.set(palettes[signed ? 'signed' : state.colours]);
  context.putImageData(image, 0, 0);
  const [low, high] = state.ask === DIFFERENCE ? ['for the label', 'for the prediction'] : signed && kind === 'values' ? ['lowers it', 'raises it'] : signed ? ['against', 'for'] : ['no evidence', 'strongest evidence'];
  $('legend-low').textContent = low;
  $('legend-high').textContent = high;
}
large.addEventListener('close', () => { const at = current; current = -1; if (at >= 0) reach(at); });
large.addEventListener('click', event => { if (event.target === large) large.close(); });
large.addEventListener('keydown', event => {
  const isField = event.target.matches('input, select');
  if (event.key === 'Tab') {
    const inside = [...large.querySelectorAll('button:not(:disabled), input, select')].filter(one => one.offsetParent !== null && (one.type !== 'radio' || one.checked));
    const [first, last] = [inside[0], inside[inside.length - 1]];
    if (event.shiftKey && (event.target === first || event.target === $('large-title'))) { event.preventDefault(); last.focus(); }
    else if (!event.shiftKey && event.target === last) { event.preventDefault(); first.focus(); }
  }
  if (isField || event.altKey || event.ctrlKey || event.metaKey) return;
  if (event.key === 'ArrowLeft') { step(-1); event.preventDefault(); }
  if (event.key === 'ArrowRight') { step(1); event.preventDefault(); }
});

// -- controls, those of the grid and those of the large picture saying the same

function segments(field, name, choices, get, set) {
  const box = make('div');
  for (const [value, text, count] of choices) {
    const input = make('input', {type: 'radio', name, value});
    input.checked = String(get()) === String(value);
    input.addEventListener('change', () => set(value));
    box.append(make('label', {}, input, make('span', {}, text, count === undefined ? null : make('small', {text: count}))));
  }
  field.append(box);
}
function sync() {
  for (const prefix of ['', 'large-']) {
    $(`${prefix}opacity`).value = state.opacity;
    $(`${prefix}opacity-said`).textContent = `${state.opacity}%`;
    $(`${prefix}method`).value = state.method;
    $(`${prefix}colours`).value = state.colours;
    for (const input of $(`${prefix}ask`).querySelectorAll('input')) input.checked = +input.value === state.ask;
  }
  document.documentElement.style.setProperty('--opacity', state.opacity/100);
}
const display = changed => { Object.assign(state, changed); sync(); if (!('opacity' in changed)) repaint(); };
const filter = changed => { Object.assign(state, changed); select(); };
const askNames = asks.map((name, i) => [i, kind === 'classes' ? {predicted: 'Prediction', actual: 'Label'}[name] : short(name, 24)]);
if (canDiffer) askNames.push([DIFFERENCE, 'Difference']);
for (const prefix of ['', 'large-']) {
  if (askNames.length > 1) segments($(`${prefix}ask`), `${prefix}ask`, askNames.slice(0, 8), () => state.ask, value => display({ask: value}));
  else $(`${prefix}ask`).hidden = true;
  $(`${prefix}method-field`).hidden = methods.length < 2;
  $(`${prefix}method`).append(...methods.map((name, i) => make('option', {value: i, text: short(name, 40)})));
  $(`${prefix}method`).addEventListener('change', event => display({method: +event.target.value}));
  $(`${prefix}colours`).append(...Object.keys(palettes).map(name => make('option', {value: name, text: colourNames[name] || name})));
  $(`${prefix}colours`).addEventListener('change', event => display({colours: event.target.value}));
  $(`${prefix}opacity`).addEventListener('input', event => display({opacity: +event.target.value}));
}
if (Object.keys(statuses).length > 1)
  segments($('status'), 'status', Object.entries(statuses).map(([name, text]) => [name, text, items.filter(item => isOf(item, name)).length]), () => state.status, value => filter({status: value}));
else $('status').hidden = true;
const counts = new Map();
if (kind !== 'values') for (const item of items) for (const c of new Set([item.label, ...item.answers.map(answer => answer.prediction)].flat())) if (c !== null) counts.set(c, (counts.get(c) || 0) + 1);
$('class').append(...[...counts].sort((a, b) => F.names[a[0]].localeCompare(F.names[b[0]])).map(([c, n]) => make('option', {value: c, text: `${short(F.names[c], 50)} (${n})`})));
$('sort').append(...Object.entries(sorts).map(([name, [text]]) => make('option', {value: name, text})));
$('search').addEventListener('input', event => filter({search: event.target.value}));
$('class').addEventListener('change', event => filter({cls: event.target.value}));
$('sort').addEventListener('change', event => filter({sort: event.target.value}));
$('sure').addEventListener('input', event => { $('sure-said').textContent = `${event.target.value}%`; filter({sure: +event.target.value}); });
$('loss').addEventListener('input', event => filter({loss: +event.target.value || 0}));
for (const form of document.querySelectorAll('form')) form.addEventListener('submit', event => event.preventDefault());
const clear = () => {
  $('search').value = $('class').value = $('loss').value = '';
  $('sure').value = 0;
  $('sure-said').textContent = '0%';
  for (const input of $('status').querySelectorAll('input')) input.checked = input.value === 'all';
  Object.assign(state, {search: '', status: 'all', cls: '', sure: 0, loss: 0, pair: null});
};
$('clear').addEventListener('click', () => { clear(); select(); });
for (const button of document.querySelectorAll('[data-actual], [data-class]')) button.addEventListener('click', () => {
  clear();
  if (button.dataset.class !== undefined) state.cls = $('class').value = button.dataset.class;
  else state.pair = {actual: +button.dataset.actual, predicted: +button.dataset.predicted};
  select();
  $('pictures').scrollIntoView();
  $('pictures').focus({preventScroll: true});
});
$('previous').addEventListener('click', () => step(-1));
$('next').addEventListener('click', () => step(1));
$('close').addEventListener('click', () => large.close());

// -- theme, keys, size, paper

const themes = {auto: 'As the system has it', light: 'Light', dark: 'Dark'}, root = document.documentElement;
$('theme').addEventListener('click', () => {
  const names = Object.keys(themes), name = names[(names.indexOf(root.dataset.theme) + 1) % names.length];
  root.dataset.theme = name;
  $('theme').textContent = `Theme: ${name}`;
  $('theme').title = themes[name];
});
document.addEventListener('keydown', event => {
  if (large.open || event.altKey || event.ctrlKey || event.metaKey) return;
  const isField = event.target.matches('input, select, textarea');
  if (event.key === '/' && !isField) { $('search').focus(); event.preventDefault(); }
  if (event.key === 'Escape' && event.target === $('search')) { $('search').value = ''; filter({search: ''}); reach(active); }
  if (event.key === 'Enter' && event.target === $('search')) { event.preventDefault(); reach(0); } // else the same key would open the picture
  if (isField || !grid.contains(event.target)) return;
  const by = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns}[event.key];
  if (by !== undefined && active + by >= 0 && active + by < order.length) reach(active + by);
  else if (event.key === 'Home') reach(0);
  else if (event.key === 'End') reach(order.length - 1);
  else if (by === undefined) return;
  event.preventDefault();
});
let isDue = false;
addEventListener('scroll', () => {
  if (isDue) return;
  isDue = true;
  requestAnimationFrame(() => { isDue = false; fill(); });
}, {passive: true});
new ResizeObserver(() => { if (!isPrinting) { layOut(); if (current >= 0) showLarge(); } }).observe(grid);
function paper(isOn) {
  isPrinting = isOn;
  $('rest').textContent = isOn && order.length > 200 ? `${order.length - 200} more are in the page itself.` : '';
  filled = '';
  fill();
  if (isOn) for (const image of grid.querySelectorAll('img')) image.decoding = 'sync'; // paper does not wait
}
addEventListener('beforeprint', () => paper(true));
addEventListener('afterprint', () => paper(false));
if (M > 1) grid.classList.add('two');
if (matchMedia('(max-width: 640px)').matches) $('more').open = false;
sync();
select();
})();
