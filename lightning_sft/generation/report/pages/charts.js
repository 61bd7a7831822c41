// -- lines over steps, as SVG

function shape(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}
function nice(most) {  // the next of 1, 2, 5, 10, 20, ...
  const power = 10 ** Math.floor(Math.log10(most));
  return power * ([1, 2, 5].find(factor => factor * power >= most) ?? 10);
}

// Draw into an <svg> of whatever size it has, and return where in it a step is.
//   lines: each with `points`, pairs of a step and a value, and a `colour`, the name of a variable of the style
//   first, last: the steps at both ends
//   ticks: the values that get a rule, the least and the greatest at the ends
//   label: a tick's text, for which there are `left` pixels
//   now: the step that is marked, if any
function drawLines(svg, {lines, first, last, ticks, label = value => number(value, 2), left = 34, now = null}) {
  const {width, height} = svg.getBoundingClientRect(), low = ticks[0], high = ticks.at(-1);
  const right = 10, top = 9, bottom = 16;
  const x = step => left + (last === first ? 0.5 : (step - first) / (last - first)) * (width - left - right);
  const y = value => height - bottom - (value - low) / (high - low) * (height - top - bottom);
  const text = (x, y, anchor, words) => shape("text", {x, y, "text-anchor": anchor}, words);
  const rule = value => [
    shape("line", {class: "grid", x1: left, x2: width - right, y1: y(value), y2: y(value)}),
    text(left - 6, y(value) + 3.5, "end", label(value)),
  ];
  svg.replaceChildren(
    ...ticks.flatMap(rule),
    text(x(first), height - 2, last === first ? "middle" : "start", number(first)),
    ...(last === first ? [] : [text(x(last), height - 2, "end", number(last))]),
    ...(now == null ? [] : [shape("line", {class: "now", x1: x(now), x2: x(now), y1: top - 5, y2: height - bottom})]),
    ...lines.map(({points, colour}) => {
      const places = points.map(([step, value]) => [x(step), y(value)]);
      const dots = points.length < 40 ? places : places.slice(-1);
      return shape("g", {class: colour.slice(2), style: `--colour: var(${colour})`},
        shape("polyline", {points: places.join(" ")}), ...dots.map(([cx, cy]) => shape("circle", {cx, cy, r: 2.5})));
    }));
  return x;
}
