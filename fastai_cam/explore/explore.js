
// -- The explorer in a notebook. What comes of data is text: it goes through textContent, never through innerHTML.
// Traits come from the kernel; the page asks and tells in messages. A mark is the page's own until the kernel has taken it.

const MARKS = {keep: ['Keep', 'k'], relabel: ['Relabel', 'r'], drop: ['Drop', 'd'], suspicious: ['Suspicious', 's']};
const AT_ONCE = 8, PATIENCE = 2500; // maps that are asked for at once; milliseconds until one is told that the kernel is busy
const KEYS = [['← → ↑ ↓', 'from picture to picture'], ['PgUp PgDn', 'from page to page'], ['k', 'keep'], ['r', 'relabel, then 1 to 9 or a name'],
  ['d', 'drop'], ['s', 'suspicious'], ['the same again', 'no mark'], ['Shift with these', 'mark, and on to the next'], ['u', 'undo'], ['/', 'search'], ['?', 'this list']];

// -- what is known, once for all the places in which a widget is shown

function makeStore(model) {
  const F = model.get('facts'), listeners = new Set(), wanted = new Map(), pictures = new Map(), maps = new Map(), failed = new Map();
  const rowOf = new Map(F.position.map((position, row) => [position, row])), me = Math.random().toString(36).slice(2), undo = [];
  const backlog = F.file ? `fastai_cam marks ${F.set} ${F.file}` : null; // marks that no kernel has taken, for the next one
  let pending = [], marked = new Map(), asked = null, nAsked = 0, problem = null;
  const changed = what => { for (const listener of [...listeners]) listener(what); };
  const tell = content => { try { model.send(content); } catch (error) { /* there is no kernel */ } };

  function recall() {
    marked = new Map(Object.entries(model.get('marked') || {}).map(([i, said]) => [+i, said]));
    for (const one of pending) if (one.mark === null) marked.delete(one.item); else marked.set(one.item, [one.mark, one.label]);
    changed('marks');
  }
  function keepBacklog() {
    if (!backlog) return;
    try { if (pending.length) localStorage.setItem(backlog, JSON.stringify(pending)); else localStorage.removeItem(backlog); } catch (error) { /* storage is forbidden here */ }
  }
  function readBacklog() {
    try { return (backlog && JSON.parse(localStorage.getItem(backlog)) || []).filter(one => rowOf.has(one.item) && (one.mark === null || one.mark in MARKS)); } catch (error) { return []; }
  }
  function set(item, said) {
    const one = {id: `${me}-${++nAsked}`, item, mark: said ? said[0] : null, label: said ? said[1] : null, since: Date.now()};
    pending.push(one);
    keepBacklog();
    tell({ask: 'marks', marks: [one]});
    recall();
    setTimeout(() => changed('status'), PATIENCE + 100);
  }
  function takeIn() {
    for (const [i, picture] of Object.entries(model.get('pictures') || {})) pictures.set(+i, picture);
    const got = model.get('maps') || {};
    for (const [i, views] of Object.entries(got.views || {})) maps.set(`${got.method} ${got.layer} ${i}`, views);
  }
  const key = (want, i) => `${want.method} ${want.layer} ${i}`;
  function ask(content) {
    asked = {...content, id: `${me}-${++nAsked}`, since: Date.now()};
    tell(asked);
    changed('status');
    setTimeout(() => changed('status'), PATIENCE + 100);
  }
  function pump() { // one question at a time, and only about what is looked at now
    if (asked) return;
    for (const want of wanted.values()) {
      const unseen = want.items.filter(i => !pictures.has(i));
      if (unseen.length) return ask({ask: 'pictures', items: want.items});
      const blank = want.items.filter(i => pictures.get(i) && !maps.has(key(want, i)) && !failed.has(key(want, i)));
      if (blank.length) return ask({ask: 'maps', items: blank.slice(0, AT_ONCE), page: want.items, method: want.method, layer: want.layer});
    }
    changed('status');
  }
  function answered(content) {
    if (!asked || content.done !== asked.id) return;
    const lacking = asked.items.filter(i => asked.ask === 'maps' ? !maps.has(key(asked, i)) : !pictures.has(i));
    const why = content.problem || 'the kernel was interrupted';
    for (const i of lacking) if (asked.ask === 'maps') failed.set(key(asked, i), why); else pictures.set(i, null);
    if (asked.ask === 'pictures' && lacking.length) problem = why;
    asked = null;
    changed('maps');
    pump();
  }
  const heard = content => {
    if (content.taken) {
      const taken = new Set(content.taken);
      pending = pending.filter(one => !taken.has(one.id));
      problem = content.problem;
      keepBacklog();
      recall();
      changed('status');
    }
    if (content.done) answered(content);
  };
  const seen = () => { takeIn(); changed('maps'); };
  model.on('msg:custom', heard);
  model.on('change:pictures', seen);
  model.on('change:maps', seen);
  model.on('change:marked', recall);
  takeIn();
  pending = readBacklog();
  if (pending.length) tell({ask: 'marks', marks: pending});
  recall();
  return {F, rowOf, pictures, undo,
    signed: () => Boolean((model.get('maps') || {}).signed),
    view: () => model.get('view') || {},
    say: view => tell({ask: 'view', view}),
    mapsOf: (i, method, layer) => maps.get(`${method} ${layer} ${i}`),
    failure: (i, method, layer) => failed.get(`${method} ${layer} ${i}`),
    markOf: i => marked.get(i),
    marks: () => marked,
    mark: (i, said) => { undo.push([i, marked.get(i) || null]); set(i, said); },
    undoLast: () => { const last = undo.pop(); if (last) set(...last); return last; },
    waiting: () => pending.filter(one => Date.now() - one.since > PATIENCE).length,
    asked: () => asked,
    problem: () => problem,
    want: (who, what) => { if (what) { wanted.set(who, what); pump(); } else wanted.delete(who); },
    retry: () => { failed.clear(); pump(); },
    listen: listener => { listeners.add(listener); return () => listeners.delete(listener); },
    stop: () => { model.off('msg:custom', heard); model.off('change:pictures', seen); model.off('change:maps', seen); model.off('change:marked', recall); }};
}

// -- one place in which it is shown

function makeView(store, el) {
  const {F, rowOf} = store, kind = F.kind, n = F.position.length;
  const palettes = Object.fromEntries(Object.entries(F.palettes).map(([name, text]) => [name, bytes(text)]));
  const asks = {classes: ['Prediction', 'Label', 'Difference'], labels: ['1st label', '2nd', '3rd'], values: F.names.slice(0, 8), none: []}[kind];
  const DIFFERENCE = kind === 'classes' ? 2 : -1, me = {};
  const state = {search: '', status: 'all', cls: '', marked: 'all', sort: Object.keys(F.sorts)[0], ask: 0, method: 0, layer: 0, colours: null, opacity: 70, page: 0, current: null, ...store.view()};
  let order = [], tiles = [], choosing = false, toldView = '';

  // texts and filters, as in the report
  const inWords = value => {
    if (value === null) return 'not known';
    if (kind === 'classes') return F.names[value];
    if (kind === 'none') return '–';
    if (!value.length) return 'none';
    const parts = kind === 'labels' ? value.map(c => F.names[c]) : value.map(x => figures(x));
    return parts.slice(0, 5).join('; ') + (parts.length > 5 ? `; +${parts.length - 5}` : '');
  };
  const has = (value, c) => Array.isArray(value) ? value.includes(c) : value === c;
  const texts = F.key.map((name, row) => [name, inWords(F.label[row]), inWords(F.prediction[row])].map(text => plain(text.slice(0, 400))).join('\n'));
  const down = (of, sign) => (a, b) => {
    const [x, y] = [of[a], of[b]].map(value => value === null ? -Infinity : sign*value);
    return (y === x ? 0 : y > x ? 1 : -1) || a - b;
  };
  const sorts = {given: (a, b) => a - b, loss: down(F.loss, 1), '-loss': down(F.loss, -1), sure: down(F.probability, 1), '-sure': down(F.probability, -1),
    label: (a, b) => inWords(F.label[a]).localeCompare(inWords(F.label[b])) || a - b,
    key: (a, b) => F.key[a].localeCompare(F.key[b], undefined, {numeric: true}) || a - b, position: (a, b) => F.position[a] - F.position[b]};
  function passes(row) {
    if (state.status !== 'all' && F.right[row] !== (state.status === 'right')) return false;
    if (state.cls !== '' && !has(F.label[row], +state.cls) && !has(F.prediction[row], +state.cls)) return false;
    const said = store.markOf(F.position[row]);
    if (state.marked === 'none' && said || state.marked === 'any' && !said) return false;
    if (state.marked in MARKS && !(said && said[0] === state.marked)) return false;
    return plain(state.search).split(/\s+/).every(word => texts[row].includes(word));
  }
  const pageItems = () => order.slice(state.page*F.page, (state.page + 1)*F.page);
  const nPages = () => Math.max(1, Math.ceil(order.length/F.page));
  const inSelect = (value, text, count) => make('option', {value, text: count === undefined ? text : `${text} (${count})`});

  // the skeleton
  const field = (name, input, cls = 'field') => make('label', {class: cls}, make('span', {text: name}), input);
  const select = (name, options, value, set) => {
    const input = make('select', {'aria-label': name}, ...options);
    input.value = value;
    input.addEventListener('change', () => set(input.value));
    return input;
  };
  let nGroups = 0;
  const segments = (name, choices, value, set) => {
    const box = make('div'), group = `${Math.random()}-${nGroups++}`;
    for (const [at, text, count] of choices) {
      const input = make('input', {type: 'radio', name: group, value: at, checked: String(value) === String(at)});
      input.addEventListener('change', () => set(at));
      box.append(make('label', {}, input, make('span', {}, isolated(text, {}, 18), count === undefined ? null : make('small', {text: count}))));
    }
    return make('fieldset', {class: 'field segments'}, make('legend', {text: name}), box);
  };
  const root = make('div', {class: 'fastai-cam-explore', role: 'group', 'aria-label': 'Pictures to look through and to mark', 'data-jp-suppress-context-menu': 'true'});
  const search = make('input', {type: 'search', class: 'search', placeholder: 'path or class', autocomplete: 'off', spellcheck: 'false', maxlength: 200});
  search.value = state.search;
  const counts = new Map();
  if (kind === 'classes' || kind === 'labels')
    for (let row = 0; row < n; row++) for (const c of new Set([F.label[row], F.prediction[row]].flat())) if (c !== null) counts.set(c, (counts.get(c) || 0) + 1);
  const classOptions = [...counts].sort((a, b) => F.names[a[0]].localeCompare(F.names[b[0]])).map(([c, count]) => inSelect(c, short(F.names[c], 50), count));
  const nOf = right => F.right.filter(one => one === right).length;
  const markedSelect = select('Marks', [], 'all', value => filter({marked: value}));
  const opacity = make('input', {type: 'range', class: 'opacity', min: 0, max: 100, 'aria-label': 'Opacity'}), opacitySaid = make('output');
  const colours = select('Colours', Object.keys(palettes).map(name => inSelect(name, colourNames[name] || name)), 'inferno', value => display({colours: value}));
  const helpButton = make('button', {type: 'button', class: 'quiet', 'aria-label': 'Keys', 'aria-expanded': 'false', text: '?'});
  const help = make('dl', {class: 'help', hidden: true}, ...KEYS.flatMap(([keys, what]) => [make('dt', {}, make('kbd', {text: keys})), make('dd', {text: what})]));
  const tools = make('div', {class: 'tools'},
    make('div', {class: 'row'}, field('Search', search, 'field grow'),
      kind === 'classes' || kind === 'labels' ? segments('Show', [['all', 'All', n], ['wrong', 'Wrong', nOf(false)], ['right', 'Right', nOf(true)]], state.status, value => filter({status: value})) : null,
      classOptions.length ? field(kind === 'labels' ? 'Label' : 'Class', select('Class', [inSelect('', 'all'), ...classOptions], state.cls, value => filter({cls: value}))) : null,
      field('Marks', markedSelect), field('Order', select('Order', Object.entries(F.sorts).map(([name, text]) => inSelect(name, text)), state.sort, value => filter({sort: value})))),
    make('div', {class: 'row'},
      asks.length > 1 ? segments('Map of', asks.map((name, at) => [at, name]), state.ask, value => display({ask: value})) : null,
      field('Method', select('Method', F.methods.map((name, at) => inSelect(at, short(name, 40))), state.method, value => filter({method: +value}, false))),
      F.layers.length > 1 ? field('Layer', select('Layer', F.layers.map((name, at) => inSelect(at, short(name, 60))), state.layer, value => filter({layer: +value}, false))) : null,
      field('Colours', colours), make('label', {class: 'field'}, make('span', {}, 'Opacity ', opacitySaid), opacity), helpButton));
  const status = make('p', {class: 'count', role: 'status', 'aria-live': 'polite'}), alarm = make('p', {class: 'alarm', role: 'alert', hidden: true});
  const before = make('button', {type: 'button', class: 'quiet', 'aria-label': 'Previous page', text: '←'}), after = make('button', {type: 'button', class: 'quiet', 'aria-label': 'Next page', text: '→'});
  const pageSaid = make('span');
  const again = make('button', {type: 'button', class: 'link', text: 'Try again', hidden: true});
  const grid = make('ul', {class: 'grid', 'aria-label': 'Pictures'}), nothing = make('p', {class: 'nothing', text: 'No picture is like that.', hidden: true});
  const detail = make('section', {class: 'detail', 'aria-label': 'Picture'});
  root.append(tools, help, make('div', {class: 'line'}, status, make('span', {class: 'pages'}, before, pageSaid, after)), make('div', {class: 'trouble'}, alarm, again), make('div', {class: 'split'}, make('div', {class: 'scroll'}, nothing, grid), detail));

  // maps
  const pictureOf = i => {
    const picture = store.pictures.get(i);
    if (!picture) return make('span', {class: 'none', text: picture === null ? 'cannot be read' : '…'});
    const found = make('span', {class: 'pic'}, make('img', {alt: '', src: `data:${picture.type};base64,${picture.data}`, draggable: 'false'}), make('canvas', {'aria-hidden': 'true', width: 1, height: 1}));
    found.style.setProperty('--wide', picture.w/picture.h);
    return found;
  };
  const entry = (views, ask) => {
    const found = views.find(one => one.ask === ask);
    return !found ? null : found.same === undefined ? found : {...views[found.same], text: found.text};
  };
  function shownMap(views) {
    const first = entry(views, state.ask === DIFFERENCE ? 0 : state.ask) || entry(views, 0);
    if (!first || !first.map) return first && {text: first.text, none: true};
    const found = {w: first.map.w, h: first.map.h, values: numbers(first.map), full: first.full, text: first.text, signed: palette() === 'signed'};
    if (state.ask !== DIFFERENCE) return found;
    const second = entry(views, 1);
    if (!second || !second.map) return {...found, text: 'the label is not known', none: true};
    const others = numbers(second.map);
    return {...found, values: found.values.map((x, at) => x - others[at]), text: `${first.text} − ${second.text}`, signed: true};
  }
  const palette = () => state.colours || (store.signed() ? 'signed' : F.palette);
  function drawOver(box, i) {
    const canvas = box.querySelector('canvas'), views = store.mapsOf(i, state.method, state.layer);
    if (!canvas) return null;
    const map = views ? shownMap(views) : null;
    if (!map || map.none) clearMap(canvas); else paintMap(canvas, map, palettes[map.signed ? 'signed' : palette()]);
    return map;
  }

  // the grid
  const saidOfMark = said => said[0] === 'relabel' ? (said[1] === null || said[1] === undefined ? 'relabel' : `→ ${F.names[said[1]]}`) : said[0];
  function badge(i) {
    const said = store.markOf(i);
    return said ? isolated(saidOfMark(said), {class: `badge ${said[0]}`}, 24) : null;
  }
  function tileOf(row) {
    const i = F.position[row], right = F.right[row];
    const value = F.probability[row] === null ? `loss ${figures(F.loss[row])}` : F.probability[row].toFixed(2);
    const frame = make('span', {class: 'frame'}, pictureOf(i));
    const button = make('button', {type: 'button', class: 'tile', tabindex: -1}, frame,
      make('span', {class: 'said'}, make('span', {class: 'hidden', text: `${rightInWords(right)} predicted `}), markOf(right), isolated(inWords(F.prediction[row]), {class: 'name'}), make('span', {class: 'value', text: value})),
      make('span', {class: 'said sub'}, make('span', {text: 'actual'}), isolated(inWords(F.label[row]))));
    const tile = {row, i, button, frame, li: make('li', {}, button)};
    button.addEventListener('click', () => { go(tiles.indexOf(tile)); });
    button.addEventListener('focus', () => { if (state.current !== i) go(tiles.indexOf(tile), false); });
    return tile;
  }
  function showMarkOf(tile) {
    for (const old of tile.button.querySelectorAll('.badge')) old.remove();
    const made = badge(tile.i);
    if (made) tile.frame.append(made);
    tile.li.classList.toggle('dropped', Boolean(store.markOf(tile.i) && store.markOf(tile.i)[0] === 'drop'));
  }
  function showPage(keepFocus = false) {
    state.page = Math.min(Math.max(0, state.page), nPages() - 1);
    const rows = pageItems();
    tiles = rows.map(tileOf);
    grid.replaceChildren(...tiles.map(tile => tile.li));
    grid.parentNode.scrollTop = 0;
    nothing.hidden = rows.length > 0;
    const at = Math.max(0, tiles.findIndex(tile => tile.i === state.current));
    state.current = tiles.length ? tiles[at].i : null;
    for (const tile of tiles) { showMarkOf(tile); drawOver(tile.frame, tile.i); }
    if (tiles.length) setStop(at, keepFocus);
    store.want(me, {items: tiles.map(tile => tile.i), method: state.method, layer: state.layer});
    closeChooser();
    showDetail();
    showStatus();
    remember();
  }
  function setStop(at, focus) {
    tiles.forEach((tile, k) => { tile.button.tabIndex = k === at ? 0 : -1; tile.li.classList.toggle('current', k === at); });
    if (focus) tiles[at].button.focus({preventScroll: true});
    const box = grid.parentNode, li = tiles[at].li;
    if (focus && box.scrollHeight > box.clientHeight) {
      if (li.offsetTop < box.scrollTop) box.scrollTop = li.offsetTop;
      else if (li.offsetTop + li.offsetHeight > box.scrollTop + box.clientHeight) box.scrollTop = li.offsetTop + li.offsetHeight - box.clientHeight;
    }
  }
  function go(at, focus = true) {
    if (at < 0 || at >= tiles.length) return;
    state.current = tiles[at].i;
    closeChooser();
    setStop(at, focus);
    showDetail();
    remember();
  }
  const at = () => tiles.findIndex(tile => tile.i === state.current);
  function step(by) {
    const next = at() + by;
    if (next >= 0 && next < tiles.length) return go(next);
    if (Math.abs(by) === 1 && (by > 0 ? state.page + 1 < nPages() : state.page > 0)) turn(by);
  }
  function turn(by) {
    if (state.page + by < 0 || state.page + by >= nPages()) return;
    state.page += by;
    state.current = null;
    const rows = pageItems();
    state.current = F.position[by > 0 ? rows[0] : rows[rows.length - 1]];
    showPage(true);
  }
  const columns = () => { const top = tiles.length ? tiles[0].li.offsetTop : 0, found = tiles.findIndex(tile => tile.li.offsetTop > top); return found < 0 ? Math.max(1, tiles.length) : found; };

  // one picture, large, with what is known of it and what can be said
  const figure = make('figure'), caption = make('figcaption'), factList = make('dl'), chooser = make('div', {class: 'chooser', hidden: true});
  const buttons = Object.fromEntries(Object.entries(MARKS).map(([name, [text, key]]) => [name, make('button', {type: 'button', class: `markbutton ${name}`, 'aria-pressed': 'false', 'aria-keyshortcuts': key}, text, make('kbd', {text: key}))]));
  const undoButton = make('button', {type: 'button', class: 'markbutton', 'aria-keyshortcuts': 'u'}, 'Undo', make('kbd', {text: 'u'}));
  detail.append(figure, caption, make('div', {class: 'marks', role: 'group', 'aria-label': 'Mark'}, ...Object.values(buttons), undoButton), chooser, factList);
  let figureOf = null;
  function showDetail() {
    detail.hidden = state.current === null;
    if (state.current === null) return;
    const i = state.current, row = rowOf.get(i), picture = store.pictures.get(i);
    if (figureOf !== `${i} ${Boolean(picture)}`) { figure.replaceChildren(pictureOf(i)); figureOf = `${i} ${Boolean(picture)}`; }
    const map = drawOver(figure, i), failure = store.failure(i, state.method, state.layer);
    caption.replaceChildren(map ? isolated(map.none ? `no map: ${map.text}` : `map of: ${map.text}`, {}, 90) : failure ? 'no map' : picture === null ? '' : 'the map is not made yet');
    const line = (name, ...inside) => [make('dt', {text: name}), make('dd', {}, ...inside)];
    const right = F.right[row], said = store.markOf(i);
    factList.replaceChildren(...line('actual', isolated(inWords(F.label[row]), {}, 160)),
      ...line('predicted', markOf(right), right === null ? '' : ' ', isolated(inWords(F.prediction[row]), {}, 160), right === null ? '' : ` (${rightInWords(right)})`),
      ...(F.probability[row] === null ? [] : line('probability', percent(F.probability[row]))), ...line('loss', figures(F.loss[row])),
      ...line('item', isolated(F.key[row], {class: 'path'}, 160)), ...line('place in the set', String(i)),
      ...line('mark', said ? isolated(saidOfMark(said), {class: `badge ${said[0]}`}, 60) : 'none'));
    for (const [name, button] of Object.entries(buttons)) button.setAttribute('aria-pressed', String(Boolean(said && said[0] === name)));
    undoButton.disabled = store.undo.length === 0;
  }
  function mark(name, label = null, onward = false) {
    const i = state.current, said = store.markOf(i);
    if (i === null) return;
    const isSame = said && said[0] === name && (said[1] === undefined ? null : said[1]) === label;
    store.mark(i, isSame ? null : [name, label]);
    if (onward) step(1);
  }
  function press(name, onward = false) {
    if (state.current === null) return;
    if (name === 'relabel' && F.relabel) openChooser(onward);
    else mark(name, null, onward);
  }
  for (const [name, button] of Object.entries(buttons)) button.addEventListener('click', () => press(name));
  function undoLast() {
    const last = store.undoLast();
    if (!last) return;
    const row = rowOf.get(last[0]), place = order.indexOf(row);
    if (place < 0) return;
    state.current = last[0];
    if (Math.floor(place/F.page) !== state.page) { state.page = Math.floor(place/F.page); showPage(true); } else go(at());
  }
  undoButton.addEventListener('click', undoLast);

  // which class it should be
  const wish = make('input', {type: 'text', class: 'search', placeholder: 'class', autocomplete: 'off', spellcheck: 'false', 'aria-label': 'Relabel to'}), offers = make('div', {class: 'offers'});
  chooser.append(make('p', {}, 'Relabel to: ', make('kbd', {text: '1'}), ' to ', make('kbd', {text: '9'}), ', or a name and ', make('kbd', {text: 'Enter'})), wish, offers);
  let onwardAfter = false, offered = [];
  function offer() {
    const row = rowOf.get(state.current), words = plain(wish.value);
    const all = [...new Set([F.prediction[row], ...F.names.keys()])].filter(c => c !== null && c !== F.label[row]);
    offered = all.filter(c => plain(F.names[c].slice(0, 400)).includes(words)).sort((a, b) => words ? plain(F.names[b].slice(0, 400)).startsWith(words) - plain(F.names[a].slice(0, 400)).startsWith(words) : 0).slice(0, 9);
    offers.replaceChildren(...offered.map((c, k) => {
      const button = make('button', {type: 'button', class: 'offer'}, make('kbd', {text: k + 1}), isolated(F.names[c], {}, 40));
      button.addEventListener('click', () => choose(c));
      return button;
    }), ...(offered.length ? [] : [make('span', {text: 'no class has such a name'})]));
  }
  function openChooser(onward) {
    choosing = true;
    onwardAfter = onward;
    wish.value = '';
    chooser.hidden = false;
    offer();
    wish.focus({preventScroll: true});
  }
  function closeChooser(focus = false) {
    if (!choosing) return;
    choosing = false;
    chooser.hidden = true;
    if (focus && at() >= 0) tiles[at()].button.focus({preventScroll: true});
  }
  function choose(c) {
    if (c === undefined) return;
    closeChooser(true);
    mark('relabel', c, onwardAfter);
  }
  wish.addEventListener('input', offer);
  wish.addEventListener('keydown', event => {
    if (event.key === 'Enter') choose(offered[0]);
    else if (event.key === 'Escape') closeChooser(true);
    else if (wish.value === '' && /^[1-9]$/.test(event.key) && !event.altKey && !event.ctrlKey && !event.metaKey) choose(offered[+event.key - 1]);
    else return;
    event.preventDefault();
  });

  // what goes on
  function showStatus() {
    const marks = store.marks(), shown = order.length === n ? `${n} picture${n === 1 ? '' : 's'}` : `${order.length} of ${n} pictures`;
    const asked = store.asked(), waiting = store.waiting(), parts = [shown, `${marks.size} marked`];
    if (F.n_all > n) parts.splice(1, 0, `of ${F.n_all} in the set`);
    if (asked && Date.now() - asked.since > PATIENCE) parts.push(asked.ask === 'maps' ? 'maps are being made, or the kernel is busy or gone' : 'pictures wait for the kernel, which is busy or gone');
    else if (asked) parts.push(asked.ask === 'maps' ? 'maps are being made …' : 'pictures are being read …');
    if (waiting) parts.push(`${waiting} mark${waiting === 1 ? ' waits' : 's wait'} for the kernel`);
    const text = parts.join(' · ');
    if (status.textContent !== text) status.textContent = text;
    pageSaid.textContent = `page ${state.page + 1} of ${nPages()}`;
    before.disabled = state.page === 0;
    after.disabled = state.page + 1 >= nPages();
    const failures = tiles.map(tile => store.failure(tile.i, state.method, state.layer)).filter(Boolean), trouble = store.problem() || failures[0];
    alarm.hidden = !trouble;
    again.hidden = !failures.length;
    if (trouble) { const said = short(failures.length && !store.problem() ? `${F.methods[state.method]} made no map: ${trouble}` : trouble, 500); if (alarm.textContent !== said) alarm.textContent = said; }
    const of = name => [...marks.values()].filter(said => said[0] === name).length;
    markedSelect.replaceChildren(inSelect('all', 'all'), inSelect('none', 'not marked', n - marks.size), inSelect('any', 'marked', marks.size), ...Object.keys(MARKS).map(name => inSelect(name, name, of(name))));
    markedSelect.value = state.marked;
  }
  function refresh(what) {
    if (what === 'marks') { tiles.forEach(showMarkOf); if (tiles.length) showDetail(); }
    if (what === 'maps') {
      for (const tile of tiles) {
        const picture = store.pictures.get(tile.i);
        if (picture !== undefined && !tile.frame.querySelector('img') && !(picture === null && tile.isNone)) { tile.frame.replaceChildren(pictureOf(tile.i)); tile.isNone = picture === null; showMarkOf(tile); }
        drawOver(tile.frame, tile.i);
      }
      if (tiles.length) showDetail();
      sync();
    }
    showStatus();
  }
  function sync() {
    colours.value = palette();
    opacity.value = state.opacity;
    opacitySaid.textContent = `${state.opacity}%`;
    root.style.setProperty('--opacity', state.opacity/100);
  }
  let timer = null;
  function remember() { // for the next time that this is shown, and for a page without a kernel
    clearTimeout(timer);
    timer = setTimeout(() => {
      const text = JSON.stringify(state);
      if (text !== toldView) { toldView = text; store.say({...state}); }
    }, 400);
  }
  function redraw() { for (const tile of tiles) drawOver(tile.frame, tile.i); if (tiles.length) showDetail(); }
  function display(changed) { Object.assign(state, changed); sync(); if (!('opacity' in changed)) redraw(); remember(); }
  function filter(changed, isOrder = true) {
    Object.assign(state, changed);
    if (isOrder) { sort(); state.page = 0; }
    showPage();
  }
  function sort() { order = [...F.position.keys()].filter(passes).sort(sorts[state.sort] || sorts.given); }
  search.addEventListener('input', () => filter({search: search.value}));
  opacity.addEventListener('input', () => display({opacity: +opacity.value}));
  before.addEventListener('click', () => turn(-1));
  after.addEventListener('click', () => turn(1));
  again.addEventListener('click', () => store.retry());
  const toggleHelp = () => { help.hidden = !help.hidden; helpButton.setAttribute('aria-expanded', String(!help.hidden)); };
  helpButton.addEventListener('click', toggleHelp);
  root.addEventListener('keydown', event => {
    event.stopPropagation(); // the notebook has keys of its own
    if (event.altKey || event.ctrlKey || event.metaKey || event.defaultPrevented) return;
    const isField = event.target.matches('input, select, textarea'), letter = event.key.toLowerCase();
    if (event.key === 'Escape' && event.target === search) filter({search: search.value = ''});
    if (event.key === 'Enter' && event.target === search && tiles.length) { go(0); event.preventDefault(); }
    if (isField) return;
    const by = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns(), ArrowDown: columns()}[event.key], name = Object.keys(MARKS).find(one => MARKS[one][1] === letter);
    if (by !== undefined) step(by);
    else if (event.key === 'Home') go(0);
    else if (event.key === 'End') go(tiles.length - 1);
    else if (event.key === 'PageDown') turn(1);
    else if (event.key === 'PageUp') turn(-1);
    else if (name) press(name, event.shiftKey);
    else if (letter === 'u') undoLast();
    else if (event.key === '?') toggleHelp();
    else if (event.key === '/') search.focus();
    else return;
    event.preventDefault();
  });
  root.addEventListener('focusin', event => event.target.setAttribute('data-lm-suppress-shortcuts', 'true')); // Notebook 7 looks at keys before they come here
  for (const type of ['keyup', 'keypress', 'contextmenu']) root.addEventListener(type, event => event.stopPropagation());
  sync();
  sort();
  const stop = store.listen(refresh);
  el.replaceChildren(root);
  showPage();
  return () => { stop(); store.want(me, null); clearTimeout(timer); };
}

export default () => {
  let store = null;
  return {
    initialize({model}) { store = makeStore(model); return store.stop; },
    render({model, el}) { store = store || makeStore(model); return makeView(store, el); },
  };
};
