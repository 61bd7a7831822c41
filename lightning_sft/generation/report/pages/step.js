"use strict";
const $ = id => document.getElementById(id);
const {title, summary, num_records, records} = JSON.parse($("data").textContent);
const MOST_CARDS = 20, MOST_TOKENS = 5_000;  // that are added at a time
const HEAD = 700, TAIL = 200;  // tokens of a long response that are shown at first

const VERDICTS = {correct: "✓ Correct", answer: "✗ Wrong answer", format: "⊘ Wrong format", unscored: "– Unscored"};
const FILTERS = {
  all: ["All", () => true],
  ...Object.fromEntries(Object.entries(VERDICTS).map(([name, label]) => [name, [label, r => r.verdict === name]])),
  cut: ["Cut off", r => r.stop_reason === "length"],
  failed: ["Reward failed", r => r.reward_error != null],
};
const SORTS = {
  number: ["Number", r => r.index],
  length: ["Length", r => r.response_length],
  entropy: ["Entropy", r => r.token_entropy],
  reward: ["Reward", r => r.reward],
};
const COLOURS = {
  entropy: ["Entropy", "0", "3+ nats"],
  log_prob: ["Log-prob", "100 %", "≤ 1 %"],
  none: ["None"],
};
const ENDS = {eos: "ended by EOS", stop: "ended by stop string", length: "✂ cut off"};
const SUMMARY = {
  reward: ["Reward"], answer_reward: ["Answer reward"], format_reward: ["Format reward"],
  response_length: ["Length", "tokens", 0],
  response_length_correct: ["Length, correct", "tokens", 0],
  response_length_incorrect: ["Length, incorrect", "tokens", 0],
  response_entropy: ["Entropy", "nats"], reward_failures: ["Reward failures"],
};

records.forEach((r, place) => {
  r.index ??= place;
  for (const list of ["tokens", "token_ids", "token_log_probs", "token_entropies"]) r[list] ??= [];
  r.verdict = r.answer_reward > 0 ? "correct" : r.format_reward != null && r.format_reward <= 0 ? "format"
    : r.answer_reward != null ? "answer" : "unscored";
});
const samples = new Map();  // how many each prompt has
for (const r of records) samples.set(r.index, (samples.get(r.index) ?? 0) + 1);
const prompts = [...samples.keys()].sort((a, b) => a - b);
const preamble = sharedStart([...new Set(records.map(r => r.prompt ?? ""))]);

function sharedStart(texts) {  // how many characters, up to a line's end or a space
  if (texts.length < 2) return 0;
  let length = texts[0].length;
  for (const text of texts) for (let i = 0; i < length; i++) if (text[i] !== texts[0][i]) length = i;
  const start = texts[0].slice(0, length), end = start.lastIndexOf("\n") + 1 || start.lastIndexOf(" ") + 1;
  return end < 80 ? 0 : end;
}

// -- state: it lives in the location's hash, so that a link, or the index around this page, can hand it on

const DEFAULTS = {filter: "all", q: "", sort: "number", colour: "entropy", prompt: ""};
const state = {...DEFAULTS};

function readState() {
  const given = new URLSearchParams(location.hash.slice(1));
  for (const key in DEFAULTS) state[key] = given.get(key) ?? DEFAULTS[key];
  if (!Object.hasOwn(FILTERS, state.filter)) state.filter = DEFAULTS.filter;
  if (!Object.hasOwn(SORTS, state.sort.replace("-", ""))) state.sort = DEFAULTS.sort;
  if (!Object.hasOwn(COLOURS, state.colour)) state.colour = DEFAULTS.colour;
}
function hashOf(changes) {
  const kept = Object.entries({...state, ...changes}).filter(([key, value]) => value !== DEFAULTS[key]);
  return new URLSearchParams(kept).toString();
}
function setState(changes) {
  const hash = hashOf(changes);
  Object.assign(state, changes);
  history.replaceState(null, "", "#" + hash);
  tellIndex({hash});
}
function tellIndex(message) {
  if (parent !== window) parent.postMessage({page: "lightning_sft", ...message}, "*");
}

// -- small things

function el(name, ...children) {  // "tag" or "tag.class"; strings among the children become text
  const [tag, className = ""] = name.split("."), element = document.createElement(tag);
  element.className = className;
  element.append(...children.filter(child => child != null));
  return element;
}
function button(label, action, name = "button") {
  const element = el(name, label);
  element.onclick = action;
  return element;
}
const press = (element, pressed) => element.setAttribute("aria-pressed", String(pressed));
const formats = [0, 1, 2, 3].map(digits => new Intl.NumberFormat("en", {maximumFractionDigits: digits}));
const number = (value, digits = 3) => value == null ? "–" : formats[digits].format(value).replace("-", "−");
const percent = logProb => logProb == null ? "–" : +(100 * Math.exp(logProb)).toPrecision(3) + " %";
const codePoint = char => "⟨U+" + char.codePointAt(0).toString(16).toUpperCase().padStart(4, "0") + "⟩";
const MARKS = {" ": "·", "\n": "↵", "\t": "⇥"};
const visible = text => text.replace(/[\s\p{C}]/gu, char => MARKS[char] ?? codePoint(char));
const pattern = flags => new RegExp(state.q.replace(/[.*+?^${}()|[\]\\\/]/g, "\\$&"), flags);
const searched = text => state.q !== "" && pattern("iu").test(text ?? "");

// -- one card

// Ten shades of entropy and ten of log-prob; the power lets small differences near 0 be seen.
const shade = share => Math.round(10 * Math.min(share, 1) ** 0.7) || 0;
const shades = (entropy, logProb) => `t e${shade(entropy / 3)} p${shade(-logProb / Math.log(100))}`;

function tokenSpan(r, from, to) {  // the tokens up to `to`: several if only the last completes their character
  const span = document.createElement("span"), [start, ...lines] = r.tokens[to].split("\n");
  const entropy = Math.max(...r.token_entropies.slice(from, to + 1));
  const logProb = Math.min(...r.token_log_probs.slice(from, to + 1));
  const last = to === r.tokens.length - 1 && r.stop_reason === "eos";
  span.className = shades(entropy, logProb) + (last ? " eos" : "");
  span.textContent = start;
  for (const line of lines) span.append(el("i.nl", "\n"), line);
  span.from = from;
  span.to = to;
  return span;
}
function tokenSpans(r, from, to) {
  const spans = document.createDocumentFragment();
  for (let i = from; i < to; i++) {
    const start = i;
    while (r.tokens[i] === "" && i + 1 < to) i++;
    spans.append(tokenSpan(r, start, i));
  }
  return spans;
}

function promptParts(r) {
  const prompt = r.prompt ?? "–", rest = prompt.slice(preamble);
  const long = rest.length > 450 || rest.split("\n").length > 8, text = el("div.text");
  const toggle = button("", () => fold(toggle.ariaExpanded === "true"), "button.fold");
  const fold = folded => {
    text.replaceChildren(el("div", folded && preamble ? "… " + rest : prompt));
    text.className = folded && long ? "text prompt folded" : "text prompt";
    toggle.textContent = folded ? "show all" : "show less";
    toggle.ariaExpanded = String(!folded);
    highlight(text);
  };
  fold((preamble > 0 || long) && !searched(long ? prompt : prompt.slice(0, preamble)));
  return [el("h2", "Prompt", preamble || long ? toggle : null), text];
}

function responseText(r) {
  const text = el("div.text"), {length} = r.tokens, whole = length <= HEAD + 2 * TAIL || searched(r.response);
  text.classList.add("response");
  text.tabIndex = 0;
  text.role = "group";
  text.ariaLabel = "Response; the arrow keys walk through its tokens";
  if (!length) text.append(r.response ?? "–");
  else if (whole) text.append(tokenSpans(r, 0, length));
  else {
    const more = () => gap.replaceWith(tokenSpans(r, HEAD, length - TAIL));
    const gap = button(`… ${number(length - HEAD - TAIL)} tokens more: show all`, more, "button.gap");
    text.append(tokenSpans(r, 0, HEAD), gap, tokenSpans(r, length - TAIL, length));
  }
  return text;
}

function card(r) {
  const link = el("a", `#${r.index}`), several = samples.get(r.index);
  link.href = "#" + hashOf({prompt: String(r.index)});
  link.title = "This prompt alone";
  const header = el("header", link, el("span.verdict", VERDICTS[r.verdict]),
    several > 1 ? el("span.dim", `sample ${(r.sample ?? 0) + 1} of ${several}`) : null,
    el("span.facts",
      el("span", `reward ${number(r.reward)}`),
      el("span", `${number(r.response_length)} tokens`),
      el("span", `${number(r.token_entropy)} nats`),
      el(r.stop_reason === "length" ? "span.cut" : "span", ENDS[r.stop_reason] ?? r.stop_reason ?? "–")),
    r.reward_error != null ? el("span.error", "⚠ reward failed: " + r.reward_error) : null);
  const expected = el("div.expected", el("h2", "Expected"), el("div.text", r.ground_truth ?? "–"));
  const article = el("article.card", header, el("div.left", el("div", ...promptParts(r), expected)),
    el("div.right", el("h2", "Response"), responseText(r)));
  article.classList.add(r.verdict);
  article.record = r;
  return article;
}

// -- the list

let fitting = [], drawn = 0;
const found = window.Highlight ? new Highlight() : null;  // colours matches without touching the document
if (found) CSS.highlights.set("found", found);

function highlight(element) {
  if (!state.q || !found) return;
  const walker = document.createTreeWalker(element, NodeFilter.SHOW_TEXT), nodes = [];
  let text = "", at = 0;
  while (walker.nextNode()) {
    nodes.push([text.length, walker.currentNode]);
    text += walker.currentNode.data;
  }
  const point = offset => {
    while (at + 1 < nodes.length && nodes[at + 1][0] <= offset) at++;
    return [nodes[at][1], offset - nodes[at][0]];
  };
  for (const {index, 0: match} of text.matchAll(pattern("giu"))) {
    const [startContainer, startOffset] = point(index), [endContainer, endOffset] = point(index + match.length);
    found.add(new StaticRange({startContainer, startOffset, endContainer, endOffset}));
  }
}

function drawMore() {
  const end = Math.min(drawn + MOST_CARDS, fitting.length);
  for (let tokens = 0; drawn < end && tokens < MOST_TOKENS; drawn++) {
    const article = card(fitting[drawn]);
    $("list").append(article);
    article.querySelectorAll(".response, .expected .text").forEach(highlight);
    tokens += article.querySelectorAll(".t").length;
  }
  $("more").hidden = drawn === fitting.length;
  $("more").textContent = `Show more (${number(fitting.length - drawn)} left)`;
  near.unobserve($("more"));  // observing it anew asks again whether it is in sight
  near.observe($("more"));
}
const near = new IntersectionObserver(([entry]) => { if (entry.isIntersecting) drawMore(); }, {rootMargin: "1200px"});

function render() {
  hideTip();
  found?.clear();
  const focused = state.prompt !== "", texts = r => [r.prompt, r.response, r.ground_truth];
  const matching = focused ? records.filter(r => String(r.index) === state.prompt)
    : state.q ? records.filter(r => texts(r).some(searched)) : records;
  const down = state.sort.startsWith("-"), value = SORTS[state.sort.replace("-", "")][1];
  fitting = focused ? [...matching] : matching.filter(FILTERS[state.filter][1]);
  fitting.sort((a, b) => ((value(a) == null) - (value(b) == null)) || (down ? -1 : 1) * (value(a) - value(b))
    || a.index - b.index || a.sample - b.sample);

  for (const id of ["filters", "search", "order"]) $(id).hidden = focused;
  if ($("search").value !== state.q) $("search").value = state.q;
  $("sort").value = state.sort.replace("-", "");
  $("direction").textContent = down ? "↓" : "↑";
  $("direction").ariaLabel = $("direction").title = down ? "Descending" : "Ascending";
  showFilters(matching);
  showFocus();
  showColour();
  $("list").replaceChildren();
  drawn = 0;
  drawMore();
  $("nothing").hidden = fitting.length > 0;
}
function showFilters(matching) {
  const names = Object.keys(FILTERS).filter(name => name === state.filter || records.some(FILTERS[name][1]));
  $("filters").replaceChildren(...names.map(name => {
    const [label, fits] = FILTERS[name], element = el("button", label, el("b", number(matching.filter(fits).length)));
    element.dataset.filter = name;
    press(element, name === state.filter);
    return element;
  }));
}
function showFocus() {
  const place = prompts.findIndex(index => String(index) === state.prompt);
  const step = (label, index) => {
    const element = button(label, () => focusOn(index));
    element.disabled = place < 0 || index === undefined;
    return element;
  };
  const all = button("All prompts", () => focusOn(""));
  all.id = "everything";
  $("focus").hidden = state.prompt === "";
  $("focus").replaceChildren(el("strong", `Prompt #${state.prompt}`), all,
    step("‹ Previous", prompts[place - 1]), step("Next ›", prompts[place + 1]));
}
function focusOn(index) {
  const from = state.prompt;
  apply({prompt: String(index)});
  scrollTo(0, 0);
  if (index === "") goTo(from);
}
function goTo(index) {  // the prompt's card, if it is among those that fit
  if (!fitting.some(r => String(r.index) === index)) return;
  const shown = () => [...$("list").children].find(article => String(article.record.index) === index);
  while (!shown()) drawMore();
  shown().scrollIntoView();
}
function showColour() {
  document.documentElement.dataset.colour = state.colour;
  $("colours").querySelectorAll("button").forEach(each => press(each, each.dataset.colour === state.colour));
  const [, low, high] = COLOURS[state.colour], steps = [...Array(7).keys()];
  const scale = steps.map(i => Object.assign(el("span"), {className: shades(i / 2, -i / 6 * Math.log(100))}));
  $("legend").replaceChildren(...(low ? [low, ...scale, high] : []));
}

// -- tokens under the pointer, a finger or the arrow keys

let current = null;
function hideTip() {
  current?.classList.remove("on");
  current = null;
  $("tip").hidden = true;
}
function showTip(span) {
  hideTip();
  current = span;
  span.classList.add("on");
  const {record: r} = span.closest("article"), places = [];
  for (let i = span.from; i <= span.to; i++) places.push(i);
  const row = (name, value) => el("tr", el("th", name), ...places.map(i => el("td", value(i))));
  $("tip").replaceChildren(el("code", visible(r.tokens[span.to]) || "◌"), el("table",
    row("probability", i => percent(r.token_log_probs[i])),
    row("log-prob", i => number(r.token_log_probs[i])),
    row("entropy", i => number(r.token_entropies[i]) + " nats"),
    row("token id", i => String(r.token_ids[i] ?? "–")),
    row("position", i => `${number(i + 1)} of ${number(r.tokens.length)}`)));
  $("tip").hidden = false;
  const box = span.getClientRects()[0], tip = $("tip").getBoundingClientRect();
  const above = box.bottom + tip.height + 12 > innerHeight && box.top > tip.height + 12;
  $("tip").style.top = (above ? box.top - tip.height - 6 : box.bottom + 6) + "px";
  $("tip").style.left = Math.max(6, Math.min(box.left, innerWidth - tip.width - 6)) + "px";
}
$("list").addEventListener("pointerover", ({target}) => {
  const span = target.closest(".t");
  if (span) showTip(span); else hideTip();
});
$("list").addEventListener("pointerleave", hideTip);
addEventListener("scroll", hideTip, {passive: true});
addEventListener("keydown", event => {
  const {key, target} = event, move = {ArrowLeft: -1, ArrowRight: 1}[key];
  if (key === "Escape") hideTip();
  if (!move || event.ctrlKey || event.metaKey || event.altKey || target.matches("input, select")) return;
  event.preventDefault();
  if (!target.matches(".response:focus-visible")) return tellIndex({move});
  const spans = [...target.querySelectorAll(".t")], next = spans[current ? spans.indexOf(current) + move : 0];
  if (!next) return;
  next.scrollIntoView({block: "nearest"});
  showTip(next);
});

// -- the controls

function apply(changes) {
  setState(changes);
  render();
}
$("list").addEventListener("click", event => {
  const link = event.target.closest("article header a");
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  focusOn(link.closest("article").record.index);
});
$("filters").addEventListener("click", ({target}) => {
  const {filter} = target.closest("button")?.dataset ?? {};
  if (filter) apply({filter});
});
let typing;
$("search").addEventListener("input", () => {
  clearTimeout(typing);
  typing = setTimeout(() => apply({q: $("search").value}), 120);
});
$("sort").append(...Object.entries(SORTS).map(([name, [label]]) => new Option(label, name)));
$("sort").onchange = () => apply({sort: ($("sort").value === "number" ? "" : "-") + $("sort").value});
$("direction").onclick = () => apply({sort: state.sort.startsWith("-") ? state.sort.slice(1) : "-" + state.sort});
for (const [colour, [label]] of Object.entries(COLOURS)) {
  const element = button(label, () => { setState({colour}); showColour(); });
  element.dataset.colour = colour;
  $("legend").before(element);
}
$("more").onclick = drawMore;
addEventListener("hashchange", () => { readState(); render(); });
if (parent !== window) {
  document.documentElement.classList.add("framed");
  let waiting;
  addEventListener("scroll", () => {  // the index opens the next step's page at the same card
    clearTimeout(waiting);
    waiting = setTimeout(() => {
      const article = document.elementFromPoint(innerWidth / 2, $("bar").offsetHeight + 24)?.closest("article");
      tellIndex({at: article && scrollY > 0 ? String(article.record.index) : ""});
    }, 150);
  }, {passive: true});
}

document.title = document.querySelector("h1").textContent = title;
$("count").textContent = num_records > records.length
  ? `the first ${number(records.length)} of ${number(num_records)} records` : `${number(num_records)} records`;
$("summary").append(...Object.entries(summary).map(([name, value]) => {
  const [label, unit, digits] = SUMMARY[name] ?? [name.replace(/^pass_at_/, "pass@")];
  const after = unit && value != null ? el("small", unit) : null;
  return el("div.card", el("dt", label), el("dd", number(value, digits), after));
}));
readState();
render();
const at = new URLSearchParams(location.hash.slice(1)).get("at");
if (at && !state.prompt) goTo(at);
