// What the page of a report and the explorer in a notebook share.

const make = (tag, attributes = {}, ...inside) => {
  const found = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === 'text') found.textContent = value;
    else if (value !== null && value !== undefined && value !== false) found.setAttribute(name, value === true ? '' : value);
  }
  found.append(...inside.filter(one => one !== null && one !== undefined));
  return found;
};
const short = (text, n = 80) => { const letters = Array.from(text); return letters.length > n ? letters.slice(0, n).join('') + '…' : text; };
const isolated = (text, attributes = {}, n = 80) =>
  make('bdi', {...attributes, text: short(text, n), title: Array.from(text).length > Math.min(n, 24) ? short(text, 600) : null});
const figures = (x, n = 3) => x === null ? '–' : Number(x.toPrecision(n)).toString();
const percent = x => x === null ? '–' : `${(100*x).toFixed(1)}%`;
const plain = text => text.normalize('NFC').toLowerCase().trim();
const markOf = right => right === null ? null : make('span', {class: right ? 'mark ok' : 'mark bad', text: right ? '✓' : '✗', 'aria-hidden': 'true'});
const rightInWords = right => right === null ? '' : right ? 'right' : 'wrong';
const colourNames = {inferno: 'warm', viridis: 'cool', signed: 'for and against'};

// maps: a few numbers, coloured here

const bytes = text => Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
const numbers = map => {
  const cells = new Int8Array(bytes(map.data).buffer), found = new Float32Array(cells.length);
  for (let i = 0; i < cells.length; i++) found[i] = cells[i]/127*map.peak;
  return found;
};
function paintMap(canvas, map, colours) {
  const context = canvas.getContext('2d');
  canvas.width = map.w;
  canvas.height = map.h;
  const image = context.createImageData(map.w, map.h);
  for (let i = 0; i < map.values.length; i++) {
    const share = map.full > 0 ? Math.max(-1, Math.min(1, map.values[i]/map.full)) : 0;
    const at = 4*Math.round(map.signed ? (share + 1)*127.5 : Math.max(0, share)*255);
    for (let c = 0; c < 4; c++) image.data[4*i + c] = colours[at + c];
  }
  context.putImageData(image, 0, 0);
}
function clearMap(canvas) { canvas.width = canvas.height = 1; }
