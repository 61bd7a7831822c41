const {runs, settings, prompts} = JSON.parse($("data").textContent);
const curves = JSON.parse($("curves").textContent);
const tokenLines = $("tokens").textContent.split("\n");  // most of the page: a line is parsed when it is shown

const MOST_CHARTS = 6, MOST_SAMPLES = 3;  // that are shown at first
const COLUMNS = {  // of the table of runs
  reward: ["Reward"], answer_reward: ["Answer reward"], format_reward: ["Format reward"],
  response_length: ["Length, tokens", 0], response_entropy: ["Entropy, nats"],
};
const FIRST_CHARTS = [
  "val/answer_reward", "train/loss", "val/loss", "val/token_accuracy", "val/response_length", "train/grad_norm",
];
const isKnown = value => value != null;
const signed = value => (value > 0 ? "+" : "") + number(value);
const name = k => runs[k].name.length > 28 ? "…" + runs[k].name.slice(-27) : runs[k].name;
function runLabel(k) {
  const label = el("span.run", el("i"), runs[k].name);
  label.style.setProperty("--colour", `var(--run${k % 8})`);
  label.title = runs[k].path;
  return label;
}

// -- the runs, and the settings in which they differ

function table(head, rows) {
  const row = (cells, tag) => el("tr", ...cells.map((cell, i) => cell instanceof Node && cell.tagName === "TD" ? cell
    : el(i && tag === "td" ? "td" : "th", cell)));
  return el("table", el("thead", row(head, "th")), el("tbody", ...rows.map(cells => row(cells, "td"))));
}
function differenceCell(difference) {
  if (!difference) return el("td", "–");
  const {mean, low, high, num_pairs, num_better, num_worse} = difference;
  if (!num_pairs) return el("td", "–", el("small", "no pairs with rewards"));
  return el(low > 0 ? "td.better" : high < 0 ? "td.worse" : "td", signed(mean),
    el("small", `95 %: ${signed(low)} to ${signed(high)}`),
    el("small", `${number(num_better)} better, ${number(num_worse)} worse`),
    el("small", `of ${number(num_pairs)} pairs`));
}
function showRuns() {
  const named = Object.keys(Object.assign({}, ...runs.map(run => run.summary)));
  const columns = [...Object.keys(COLUMNS), ...named.filter(key => key.startsWith("pass_at_"))]
    .filter(key => runs.some(run => isKnown(run.summary[key])));
  const labels = columns.map(key => COLUMNS[key]?.[0] ?? key.replace("pass_at_", "pass@"));
  const steps = runs.some(run => isKnown(run.step)) ? runs.map(run => [number(run.step)]) : runs.map(() => []);
  const head = ["Run", ...steps[0].map(() => "Step"), `Reward above ${name(0)}`, ...labels, "Responses"];
  $("runs").append(table(head, runs.map((run, k) => [
    runLabel(k), ...steps[k], differenceCell(run.difference),
    ...columns.map(key => number(run.summary[key], COLUMNS[key]?.[1])), number(run.num_responses),
  ])));
  $("runs").after(...runs.flatMap(run => run.notes.map(note => el("div.note", "⚠ " + note))));
  $("settings").hidden = !settings.length;
  $("settings").firstElementChild.textContent =
    settings.length === 1 ? "1 setting differs" : `${number(settings.length)} settings differ`;
  const rows = settings.map(({name, values}) => [name, ...values.map(value => value ?? "–")]);
  $("settings").lastElementChild.append(table(["", ...runs.map((_, k) => runLabel(k))], rows));
}

// -- the curves

const compact = new Intl.NumberFormat("en", {notation: "compact", maximumSignificantDigits: 4});
function short(value) {
  const size = Math.abs(value ?? 0);
  if (size === 0 || size >= 0.01 && size < 1e5) return number(value);
  return (size < 0.01 ? Number(value.toPrecision(2)).toExponential() : compact.format(value)).replaceAll("-", "−");
}
function ticksOf(values) {
  const most = values.reduce((most, value) => Math.max(most, value), -Infinity);
  const least = values.reduce((least, value) => Math.min(least, value), Infinity);
  const gap = nice((most - least || Math.abs(most) || 1) / 3), ticks = [];
  for (let i = Math.floor(least / gap); ; i++) {
    ticks.push(+(i * gap).toPrecision(12));
    if (ticks.at(-1) >= most && ticks.length > 1) return ticks;
  }
}
const runsWithCurves = runs.map((_, k) => k).filter(k => Object.values(curves).some(each => each[k].length));
function chart(metric) {
  const lines = runsWithCurves.map(k => ({points: curves[metric][k], colour: `--run${k % 8}`, title: runs[k].name}));
  const steps = [...new Set(lines.flatMap(({points}) => points.map(([step]) => step)))].sort((a, b) => a - b);
  const ticks = ticksOf(lines.flatMap(({points}) => points.map(([, value]) => value)));
  const svg = shape("svg", {role: "img", "aria-label": `${metric} over the steps`});
  const caption = el("figcaption"), figure = el("figure.card", caption, svg);
  figure.draw = (now = null) => {
    const values = lines.map(({points, colour, title}) => {
      const at = now == null ? points.at(-1) : points.findLast(([step]) => step <= now);
      const key = el("span", el("i"), el("b", short(at?.[1])));
      key.style.setProperty("--colour", `var(${colour})`);
      key.title = title;
      return key;
    });
    const step = now == null ? null : el("span", `step ${number(now)}`);
    caption.replaceChildren(...[el("strong", metric), step, ...values].filter(isKnown));
    const x = drawLines(svg, {lines, first: steps[0], last: steps.at(-1), ticks, label: short, left: 44, now});
    svg.onpointermove = ({clientX}) => {
      const pointer = clientX - svg.getBoundingClientRect().left;
      const nearest = steps.reduce((a, b) => Math.abs(x(b) - pointer) < Math.abs(x(a) - pointer) ? b : a);
      if (nearest !== now) figure.draw(nearest);
    };
    svg.onpointerleave = () => figure.draw();
  };
  return figure;
}
function showCharts(most) {
  const metrics = Object.keys(curves), chosen = FIRST_CHARTS.filter(metric => metrics.includes(metric));
  const ordered = [...chosen, ...metrics.filter(metric => !chosen.includes(metric)).sort()];
  $("charts").replaceChildren(...ordered.slice(0, most).map(chart));
  for (const figure of $("charts").children) figure.draw();
  $("more_charts").hidden = ordered.length <= most;
  $("more_charts").textContent = `${number(ordered.length - most)} more curves`;
}
$("more_charts").onclick = () => showCharts(Infinity);
addEventListener("resize", () => { for (const figure of $("charts").children) figure.draw(); });

// -- the prompts: what each run's samples come to, and what that differs by

function mean(values) {
  const known = values.filter(isKnown);
  return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : null;
}
for (const p of prompts) {
  p.of = p.responses.map(records => ({
    reward: mean(records.map(r => r.reward)),
    right: mean(records.map(r => r.answer_reward == null ? null : Number(r.answer_reward > 0))),
    log_prob: mean(records.map(r => r.log_prob)),
    length: mean(records.map(r => r.response_length)),
    text: records.length ? JSON.stringify(records.map(r => r.response)) : null,
  }));
}
// Above the first run's, by the run that differs most from it; null where no two runs have the value.
function above(p, key) {
  const [first, ...others] = p.of.map(values => values[key]);
  const known = first == null ? [] : others.filter(isKnown).map(value => value - first);
  return known.length ? known.reduce((a, b) => Math.abs(b) > Math.abs(a) ? b : a) : null;
}
const differs = (p, key) => new Set(p.of.map(values => values[key]).filter(isKnown)).size > 1;
const isCommon = p => p.responses.every(records => records.length);
const several = prompts.some(p => p.responses.some(records => records.length > 1));
const others = runs.map((_, k) => k).slice(1);
const isAhead = (p, a, b) => p.of[a].right != null && p.of[b].right != null && p.of[a].right > p.of[b].right;
const ahead = (a, b) => several ? `${name(a)} right more often than ${name(b)}` : `${name(a)} right, ${name(b)} wrong`;
const FILTERS = {
  all: ["All", () => true],
  ...Object.fromEntries(others.flatMap(k => [
    [`gained_${k}`, [ahead(k, 0), p => isAhead(p, k, 0)]],
    [`lost_${k}`, [ahead(0, k), p => isAhead(p, 0, k)]],
  ])),
  reward: ["Different rewards", p => differs(p, "reward")],
  text: ["Different responses", p => differs(p, "text")],
  missing: ["Not asked of all", p => !isCommon(p), "Prompts that only some of the runs have"],
};
const SORTS = {
  number: ["Number", p => p.index, true],
  reward: ["Difference in reward", p => above(p, "reward")],
  log_prob: ["Difference in log-prob", p => above(p, "log_prob")],
  length: ["Difference in length", p => above(p, "length")],
};

// -- a prompt's card: the responses of all runs side by side

function withTokens(r) {
  if (r.tokens) return r;
  if (r.line != null) {
    [r.tokens, r.token_ids, r.token_log_probs, r.token_entropies] = JSON.parse(tokenLines[r.line]);
  }
  fillLists(r);
  return r;
}
function markDeparture(text, response, other) {  // the first token that is not as in another response
  let same = 0, at = 0;
  while (same < response.length && response[same] === other[same]) same++;
  if (same === response.length && same === other.length) return;
  for (const span of text.children) {
    if (!span.classList.contains("t")) return;
    at += span.textContent.length;
    if (at <= same) continue;
    span.classList.add("departs");
    return;
  }
}
function sample(p, k, i) {
  const r = withTokens(p.responses[k][i]), text = generated(r), reference = p.responses[0][i];
  if (k && reference) markDeparture(text, r.response, reference.response);
  const verdict = verdictOf(r), {length} = p.responses[k];
  const element = el("div.sample", el("div.facts",
    el("span.verdict", VERDICTS[verdict]),
    length > 1 ? el("span", `sample ${i + 1} of ${length}`) : null,
    ...facts(r),
    isKnown(r.log_prob) ? el("span", `log-prob ${number(r.log_prob)}`) : null,
    rewardError(r)), text);
  element.classList.add(verdict);
  return element;
}
function column(p, k) {
  const {length} = p.responses[k], most = state.q ? length : MOST_SAMPLES;  // what is searched may be in any of them
  const samples = (from, to) => [...Array(length).keys()].slice(from, to).map(i => sample(p, k, i));
  const box = el("div.column", el("h2", runLabel(k)), ...samples(0, most));
  box.style.setProperty("--colour", `var(--run${k % 8})`);
  if (!length) box.append(el("div.dim", "This run was not asked."));
  if (length > most) {
    const more = () => rest.replaceWith(...samples(most));
    const rest = button(`show all ${number(length)} samples`, more, "button.gap");
    box.append(rest);
  }
  return box;
}
function card(p) {
  const reward = above(p, "reward");
  const words = reward ? `${reward > 0 ? "▲" : "▼"} reward ${signed(reward)}`
    : !differs(p, "text") && isCommon(p) ? "= same responses" : reward === 0 ? "= same reward" : null;
  const header = el("header", focusLink(p), words ? el("span.verdict", words) : null);
  const columns = el("div.columns", ...runs.map((_, k) => column(p, k)));
  const truths = p.ground_truths.length ? p.ground_truths.map(expected) : [expected(null)];
  const left = el("div.left", el("div", ...promptParts(p), ...truths));
  const article = el("article.card", header, left, el("div.right", columns));
  if (runs.length === 2) article.classList.add("two");
  if (reward) article.classList.add(reward > 0 ? "better" : "worse");
  return article;
}

function count() {
  const two = runs.length === 2, all = two ? "both runs" : `all ${runs.length} runs`;
  const parts = [[prompts.filter(isCommon), `prompts that ${all} were asked`]];
  if (two) {
    for (const k of [0, 1]) parts.push([prompts.filter(p => !p.responses[1 - k].length), `that only ${name(k)} was`]);
  } else parts.push([prompts.filter(p => !isCommon(p)), "that only some of them were"]);
  const isBare = r => r.line == null && r.response_length > 0;
  parts.push([prompts.filter(p => p.responses.flat().some(isBare)), "are shown without their tokens"]);
  return parts.filter(([{length}], i) => length || !i).map(([{length}, words]) => `${number(length)} ${words}`).join(", ");
}

$("legend").after(el("span.dim", el("i.departs"), `where a response departs from ${name(0)}’s`));
showRuns();
start({
  title: "Runs compared: " + runs.map(run => run.name).join(", "), count: count(),
  records: prompts, filters: FILTERS, sorts: SORTS, card,
  defaults: {filter: "all", q: "", sort: "number", colour: "entropy", prompt: ""},
  focus: {key: "prompt", name: "Prompt"},
  texts: p => [p.prompt, ...p.ground_truths, ...p.responses.flatMap(records => records.map(r => r.response))],
});
showCharts(MOST_CHARTS);
