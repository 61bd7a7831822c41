const MOST_CARDS = 20, MOST_TOKENS = 5_000;  // that are added at a time
const HEAD = 700, TAIL = 200;  // tokens of a long response that are shown at first

let page = null;  // what the page's own script has told `start`
let fitting = [], drawn = 0;  // the records that fit the state, and how many of them have a card
let places = [];  // numbers of all records, in order
let preamble = 0;  // how many characters all prompts start with

// Show records as cards that can be filtered, searched and sorted.
//   title, count, summary: what stands above; a summary, if there is one, has `labels`: a label, unit, decimals, a factor
//   records: each with `index`, `prompt`, `response`, and lists for its tokens
//   filters: by name, a label, which records fit, and what that means where the label does not say it
//   sorts: by name, a label, what of a record counts, and whether the least comes first
//   defaults: of the state
//   focus: the key of the state that holds the number of the records shown alone, and what such a thing is called
//   texts: what of a record is searched
//   card: a record's <article>
//   tell: is given each new hash, and each arrow key that no response has taken
function start(given) {
  page = given;
  page.records.forEach(fillLists);
  places = [...new Set(page.records.map(r => r.index))].sort((a, b) => a - b);
  preamble = sharedStart([...new Set(page.records.map(r => r.prompt ?? ""))]);
  document.title = document.querySelector("h1").textContent = page.title;
  $("count").textContent = page.count;
  $("summary")?.append(...Object.entries(page.summary).map(([name, value]) => {
    const [label, unit, digits, factor = 1] = page.labels[name] ?? [name.replace(/^pass_at_/, "pass@")];
    const after = unit && value != null ? el("small", unit) : null;
    return el("div.card", el("dt", label), el("dd", number(value == null ? value : factor * value, digits), after));
  }));
  $("sort").append(...Object.entries(page.sorts).map(([name, [label]]) => new Option(label, name)));
  readState();
  render();
}

function fillLists(r) {
  for (const list of ["tokens", "token_ids", "token_log_probs", "token_entropies"]) r[list] ??= [];
}
function sharedStart(texts) {  // how many characters, up to a line's end or a space
  if (texts.length < 2) return 0;
  let length = texts[0].length;
  for (const text of texts) for (let i = 0; i < length; i++) if (text[i] !== texts[0][i]) length = i;
  const start = texts[0].slice(0, length), end = start.lastIndexOf("\n") + 1 || start.lastIndexOf(" ") + 1;
  return end < 80 ? 0 : end;
}

// -- state: it lives in the location's hash, so that a link, or the index around a step's page, can hand it on

const state = {};

function readState() {
  const given = new URLSearchParams(location.hash.slice(1)), {defaults} = page;
  for (const key in defaults) state[key] = given.get(key) ?? defaults[key];
  if (!Object.hasOwn(page.filters, state.filter)) state.filter = defaults.filter;
  if (!Object.hasOwn(page.sorts, state.sort.replace("-", ""))) state.sort = defaults.sort;
  if (!Object.hasOwn(COLOURS, state.colour)) state.colour = defaults.colour;
}
function hashOf(changes) {
  const kept = Object.entries({...state, ...changes}).filter(([key, value]) => value !== page.defaults[key]);
  return new URLSearchParams(kept).toString();
}
function setState(changes) {
  const hash = hashOf(changes);
  Object.assign(state, changes);
  history.replaceState(null, "", "#" + hash);
  page.tell?.({hash});
}
function apply(changes) {
  setState(changes);
  render();
}

// -- search

const pattern = flags => new RegExp(state.q.replace(/[.*+?^${}()|[\]\\\/]/g, "\\$&"), flags);
const searched = text => state.q !== "" && pattern("iu").test(text ?? "");
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

// -- the parts of a card

function focusLink(r) {
  const link = el("a", `#${r.index}`);
  link.href = "#" + hashOf({[page.focus.key]: String(r.index)});
  link.title = `This ${page.focus.name.toLowerCase()} alone`;
  return link;
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
  text.record = r;
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

// -- the list

function drawMore() {
  const end = Math.min(drawn + MOST_CARDS, fitting.length);
  for (let tokens = 0; drawn < end && tokens < MOST_TOKENS; drawn++) {
    const article = page.card(fitting[drawn]);
    article.record = fitting[drawn];
    $("list").append(article);
    article.querySelectorAll(".response, .expected .text, .location").forEach(highlight);
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
  const alone = state[page.focus.key], focused = alone !== "";
  const matching = focused ? page.records.filter(r => String(r.index) === alone)
    : state.q ? page.records.filter(r => page.texts(r).some(searched)) : page.records;
  const down = state.sort.startsWith("-"), value = page.sorts[state.sort.replace("-", "")][1];
  fitting = focused ? [...matching] : matching.filter(page.filters[state.filter][1]);
  fitting.sort((a, b) => ((value(a) == null) - (value(b) == null)) || (down ? -1 : 1) * (value(a) - value(b))
    || a.index - b.index || a.sample - b.sample);

  for (const id of ["filters", "search", "order"]) $(id).hidden = focused;
  if ($("search").value !== state.q) $("search").value = state.q;
  $("sort").value = state.sort.replace("-", "");
  $("direction").textContent = down ? "↓" : "↑";
  $("direction").ariaLabel = $("direction").title = down ? "Descending" : "Ascending";
  showFilters(matching);
  showFocus();
  colourTokens(state.colour);
  $("list").replaceChildren();
  drawn = 0;
  drawMore();
  $("nothing").hidden = fitting.length > 0;
}
function showFilters(matching) {
  const {filters, records} = page;
  const names = Object.keys(filters).filter(name => name === state.filter || records.some(filters[name][1]));
  $("filters").replaceChildren(...names.map(name => {
    const [label, fits, meaning = ""] = filters[name];
    const element = el("button", label, el("b", number(matching.filter(fits).length)));
    element.dataset.filter = name;
    element.title = meaning;
    press(element, name === state.filter);
    return element;
  }));
}
function showFocus() {
  const {key, name} = page.focus, place = places.findIndex(index => String(index) === state[key]);
  const step = (label, index) => {
    const element = button(label, () => focusOn(index));
    element.disabled = place < 0 || index === undefined;
    return element;
  };
  const all = button(`All ${name.toLowerCase()}s`, () => focusOn(""));
  all.id = "everything";
  $("focus").hidden = state[key] === "";
  $("focus").replaceChildren(el("strong", `${name} #${state[key]}`), all,
    step("‹ Previous", places[place - 1]), step("Next ›", places[place + 1]));
}
function focusOn(index) {
  const {key} = page.focus, from = state[key];
  apply({[key]: String(index)});
  scrollTo(0, 0);
  if (index === "") goTo(from);
}
function goTo(index) {  // the card of that number, if it is among those that fit
  if (!fitting.some(r => String(r.index) === index)) return;
  const shown = () => [...$("list").children].find(article => String(article.record.index) === index);
  while (!shown()) drawMore();
  shown().scrollIntoView();
}

// -- the controls

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
$("sort").onchange = () => {
  const name = $("sort").value, [, , ascending] = page.sorts[name];
  apply({sort: ascending ? name : "-" + name});
};
$("direction").onclick = () => apply({sort: state.sort.startsWith("-") ? state.sort.slice(1) : "-" + state.sort});
for (const [colour, [label]] of Object.entries(COLOURS)) {
  const element = button(label, () => { setState({colour}); colourTokens(colour); });
  element.dataset.colour = colour;
  $("legend").before(element);
}
$("more").onclick = drawMore;
addEventListener("hashchange", () => { readState(); render(); });
addEventListener("keydown", event => {
  const {key, target} = event, move = {ArrowLeft: -1, ArrowRight: 1}[key];
  if (key === "Escape") hideTip();
  if (!move || event.ctrlKey || event.metaKey || event.altKey || target.matches("input, select")) return;
  event.preventDefault();
  if (target.matches(".response:focus-visible")) showNext(target, move);
  else page.tell?.({move});
});
