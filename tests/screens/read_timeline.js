// What is drawn on a page of a plan: every box and word of both canvases, in pixels, as they are painted.
(() => {
  const pen = CanvasRenderingContext2D.prototype, fill = pen.fillRect, write = pen.fillText;
  const drawn = { timeline: { boxes: [], words: [] }, memory: { boxes: [], words: [] } };
  pen.fillRect = function (x, y, width, height) {
    drawn[this.canvas.id].boxes.push({ x, y, width, height, colour: this.fillStyle });
    return fill.call(this, x, y, width, height);
  };
  pen.fillText = function (text, x, y) {
    drawn[this.canvas.id].words.push({ text, x, y, align: this.textAlign, colour: this.fillStyle, width: this.measureText(text).width });
    return write.call(this, text, x, y);
  };
  draw();
  pen.fillRect = fill; pen.fillText = write;
  const ratio = window.devicePixelRatio || 1;
  for (const name of Object.keys(drawn)) {
    const canvas = document.getElementById(name), copy = document.createElement('canvas');
    Object.assign(copy, { width: canvas.width, height: canvas.height });
    const own = copy.getContext('2d', { willReadFrequently: true });
    own.drawImage(canvas, 0, 0);
    const shot = own.getImageData(0, 0, canvas.width, canvas.height);
    const hex = (x, y) => {
      const at = 4 * (Math.round(y * ratio) * canvas.width + Math.round(x * ratio));
      return '#' + [...shot.data.slice(at, at + 3)].map(b => b.toString(16).padStart(2, '0')).join('');
    };
    // what is left of a box when all is painted: near its upper edge, where no word stands
    for (const box of drawn[name].boxes) if (box.width > 4) box.seen = hex(box.x + box.width / 2, box.y + 1);
    Object.assign(drawn[name], { width: canvas.clientWidth, height: canvas.clientHeight });
  }
  const swatches = id => [...document.querySelectorAll(`#${id} span`)].map(s => {
    const [r, g, b] = getComputedStyle(s.firstChild).backgroundColor.match(/\d+/g).map(Number);
    return { name: s.textContent, colour: '#' + [r, g, b].map(n => n.toString(16).padStart(2, '0')).join('') };
  });
  return { ...drawn, passes: swatches('passes'), parts: swatches('parts'), said: document.querySelector('main').innerText };
})()
