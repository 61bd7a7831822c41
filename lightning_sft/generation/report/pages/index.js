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

// -- the charts

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
  const first = steps[0].step, last = steps.at(-1).step;
  figure.className = "card";
  figure.draw = () => {
    const x = drawLines(svg, {
      lines: present.map(name => ({
        points: steps.filter(has(name)).map(({step, summary}) => [step, summary[name]]), colour: lines[name][1],
      })),
      first, last, ticks: [low, (low + high) / 2, high], now: steps[chosen].step,
    });
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
