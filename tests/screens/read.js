// What is drawn on the page of a run, row by row: ends of curves in pixels, labels of axes, cells.
[...document.querySelectorAll('section')].map(section => ({
  row: section.dataset.row,
  panels: [...section.querySelectorAll('figure')].map(figure => {
    const ticks = name => [...figure.querySelectorAll('.' + name)].map(t =>
      ({ value: +t.dataset.value, at: +t.dataset.at, text: t.textContent }));
    const canvas = figure.querySelector('canvas'), number = figure.querySelector('.value');
    const pixels = () => {
      const pen = canvas.getContext('2d');
      const { data } = pen.getImageData(0, 0, canvas.width, canvas.height);
      return {
        metric: canvas.dataset.metric,
        lefts: JSON.parse(canvas.dataset.lefts),
        range: JSON.parse(canvas.dataset.range),
        legend: [...figure.querySelector('.legend span').childNodes].map(n => n.textContent),
        offset: parseFloat(canvas.style.left),
        width: canvas.width,
        height: canvas.height,
        bytes: btoa(Array.from(data, b => String.fromCharCode(b)).join('')),
      };
    };
    return {
      title: figure.querySelector('figcaption b').textContent,
      unit: figure.querySelector('.unit')?.textContent ?? '',
      number: number && { metric: number.dataset.metric, text: number.textContent, unit: number.dataset.unit },
      curves: [...figure.querySelectorAll('path.curve[data-metric]')].map(p => ({ metric: p.dataset.metric, d: p.getAttribute('d') })),
      cells: canvas && pixels(), xticks: ticks('xtick'), yticks: ticks('ytick'),
    };
  }),
}))
