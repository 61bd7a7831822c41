"use strict";
const $ = id => document.getElementById(id);
const steps = JSON.parse($("data").textContent);
const named = Object.keys(Object.assign({}, ...steps.map(({summary}) => summary)));
const passes = named.filter(name => name.startsWith("pass_at_"));
const CHARTS = [  // title, decimals, least height of the scale, and what each line is called and coloured
  ["Rewards", 3, 1, {
    reward: ["Reward", "--wide"],
    answer_reward: ["Answer", "--one"],
    format_reward: ["Format", "--two"],
    ...Object.fromEntries(passes.map(name => [name, [name.replace("pass_at_", "pass@"), "--three"]])),
  }],
  ["Length, tokens", 0, 0, {
    response_length: ["All", "--wide"],
    response_length_correct: ["Correct", "--one"],
    response_length_incorrect: ["Incorrect", "--three"],
  }],
  ["Entropy, nats", 3, 0, {response_entropy: ["", "--three"]}],
];
const number = (value, digits) => value == null ? "–" : value.toLocaleString("en", {maximumFractionDigits: digits});

function el(tag, ...children) {
  const element = document.createElement(tag);
  element.append(...children);
  return element;
}
function shape(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// -- the charts

function nice(most) {  // the next of 1, 2, 5, 10, 20, ...
  const power = 10 ** Math.floor(Math.log10(most));
  return power * ([1, 2, 5].find(factor => factor * power >= most) ?? 10);
}
function chart([title, digits, least, lines]) {
  const svg = shape("svg", {role: "img", "aria-label": `${title} over the steps`});
  const caption = el("figcaption", el("strong", title)), figure = el("figure", caption, svg);
  const present = Object.keys(lines).filter(name => steps.some(has(name)));
  for (const name of present) {
    const [label, colour] = lines[name], value = el("b", number(steps[chosen].summary[name], digits));
    const key = el("span", ...(label ? [el("i"), label] : []), value);
    key.style.setProperty("--colour", `var(${colour})`);
    caption.append(key);
  }
  const values = present.flatMap(name => steps.filter(has(name)).map(({summary}) => summary[name]));
  const low = Math.min(0, ...values), high = nice(Math.max(least, ...values) || 1);
  const first = steps[0].step, last = steps.at(-1).step, left = 34, right = 10, top = 9, bottom = 16;
  figure.className = "card";
  figure.draw = () => {
    const {width, height} = svg.getBoundingClientRect();
    const x = step => left + (last === first ? 0.5 : (step - first) / (last - first)) * (width - left - right);
    const y = value => height - bottom - (value - low) / (high - low) * (height - top - bottom);
    const label = (x, y, anchor, value) => shape("text", {x, y, "text-anchor": anchor}, number(value, 2));
    const rule = value => [
      shape("line", {class: "grid", x1: left, x2: width - right, y1: y(value), y2: y(value)}),
      label(left - 6, y(value) + 3.5, "end", value),
    ];
    const now = x(steps[chosen].step);
    svg.replaceChildren(
      ...[low, (low + high) / 2, high].flatMap(rule),
      label(x(first), height - 2, last === first ? "middle" : "start", first),
      ...(last === first ? [] : [label(x(last), height - 2, "end", last)]),
      shape("line", {class: "now", x1: now, x2: now, y1: top - 5, y2: height - bottom}),
      ...present.map(name => {
        const points = steps.filter(has(name)).map(({step, summary}) => [x(step), y(summary[name])]);
        const [, colour] = lines[name], dots = points.length < 40 ? points : points.slice(-1);
        return shape("g", {class: colour.slice(2), style: `--colour: var(${colour})`},
          shape("polyline", {points: points.join(" ")}), ...dots.map(([cx, cy]) => shape("circle", {cx, cy, r: 2.5})));
      }));
    svg.onclick = event => {
      const distances = steps.map(({step}) => Math.abs(x(step) - (event.clientX - svg.getBoundingClientRect().left)));
      choose(distances.indexOf(Math.min(...distances)));
    };
  };
  return figure;
}
const has = name => ({summary}) => summary[name] != null;
function drawCharts() {
  $("charts").replaceChildren(...CHARTS.map(chart));
  for (const figure of $("charts").children) figure.draw();
}

// -- the step; the hash holds it, and with it what the step's page says of its own state

let chosen, pageHash, at = "";
const address = step => "./" + step.page.split("/").map(encodeURIComponent).join("/");
function readHash() {
  const given = new URLSearchParams(location.hash.slice(1)), step = Number(given.get("step"));
  const place = steps.findIndex(entry => entry.step === step);
  chosen = given.has("step") && place >= 0 ? place : steps.length - 1;
  given.delete("step");
  pageHash = given.toString();
}
function writeHash() {
  history.replaceState(null, "", `#step=${steps[chosen].step}${pageHash && "&" + pageHash}`);
  $("alone").href = `${address(steps[chosen])}#${pageHash}`;
}
function show() {
  writeHash();
  $("step").replaceChildren(`Step ${number(steps[chosen].step)} `, el("small", `${chosen + 1} of ${steps.length}`));
  $("slider").max = steps.length - 1;
  $("slider").value = chosen;
  $("slider").setAttribute("aria-valuetext", `step ${steps[chosen].step}`);
  $("previous").disabled = chosen === 0;
  $("next").disabled = chosen === steps.length - 1;
  drawCharts();
  const hash = pageHash + (at && `&at=${encodeURIComponent(at)}`);
  // Setting `src` would add each step to the history.
  $("frame").contentWindow.location.replace(new URL(`${address(steps[chosen])}#${hash}`, location.href));
}
function choose(place) {
  if (place === chosen || !steps[place]) return;
  chosen = place;
  show();
}

$("previous").addEventListener("click", () => choose(chosen - 1));
$("next").addEventListener("click", () => choose(chosen + 1));
$("slider").addEventListener("input", () => choose($("slider").valueAsNumber));
addEventListener("keydown", event => {
  const move = {ArrowLeft: -1, ArrowRight: 1}[event.key];
  if (!move || event.ctrlKey || event.metaKey || event.altKey || event.target === $("slider")) return;
  event.preventDefault();
  choose(chosen + move);
});
addEventListener("message", ({source, data}) => {
  if (source !== $("frame").contentWindow || data?.page !== "lightning_sft") return;
  if (typeof data.move === "number") choose(chosen + data.move);
  if (typeof data.at === "string") at = data.at;
  if (typeof data.hash === "string") { pageHash = data.hash; writeHash(); }
});
addEventListener("hashchange", () => { readHash(); show(); });
addEventListener("resize", () => { for (const figure of $("charts").children) figure.draw(); });
$("folder").textContent = decodeURIComponent(location.pathname).split("/").slice(-4, -1).join("/");
readHash();
show();
