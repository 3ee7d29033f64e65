
for (const plot of document.querySelectorAll('[data-chart]')) {
  const chart = JSON.parse(plot.dataset.chart);
  const area = plot.querySelector('.area');
  const line = area.appendChild(document.createElement('div'));
  const box = area.appendChild(document.createElement('div'));
  line.className = 'cursor';
  box.className = 'readout';
  const nearest = (steps, step) => {
    let low = 0, high = steps.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (steps[middle] < step) low = middle; else high = middle;
    }
    return step - steps[low] < steps[high] - step ? low : high;
  };
  const show = event => {
    const frame = area.getBoundingClientRect();
    const share = Math.min(1, Math.max(0, (event.clientX - frame.left) / frame.width));
    const step = chart.low + share * (chart.high - chart.low);
    const at = chart.curves.map(curve => curve.steps[nearest(curve.steps, step)]);
    const here = at.reduce((a, b) => Math.abs(b - step) < Math.abs(a - step) ? b : a);
    const place = 100 * (here - chart.low) / (chart.high - chart.low);
    line.style.left = place + '%';
    box.replaceChildren();
    const head = box.appendChild(document.createElement('b'));
    head.textContent = 'step ' + here.toLocaleString('en');
    for (const curve of chart.curves) {
      const i = nearest(curve.steps, here);
      const row = box.appendChild(document.createElement('span'));
      const key = row.appendChild(document.createElement('i'));
      key.className = 'swatch c' + curve.colour;
      const off = curve.steps[i] === here ? '' : ' (step ' + curve.steps[i].toLocaleString('en') + ')';
      row.append(curve.name + off);
      box.appendChild(document.createElement('em')).textContent = curve.values[i];
    }
    box.classList.toggle('left', place > 50);
    box.style.left = place + '%';
    plot.classList.add('live');
  };
  area.addEventListener('pointermove', show);
  area.addEventListener('pointerdown', show);
  area.addEventListener('pointerleave', () => plot.classList.remove('live'));
}
document.documentElement.classList.add('script');
