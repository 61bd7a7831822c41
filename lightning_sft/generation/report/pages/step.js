const {title, summary, num_records, records} = JSON.parse($("data").textContent);

const FILTERS = {
  all: ["All", () => true],
  ...Object.fromEntries(Object.entries(VERDICTS).map(([name, label]) => [name, [label, r => r.verdict === name]])),
  cut: ["Cut off", r => r.stop_reason === "length"],
  failed: ["Reward failed", r => r.reward_error != null],
};
const SORTS = {
  number: ["Number", r => r.index, true],
  length: ["Length", r => r.response_length],
  entropy: ["Entropy", r => r.token_entropy],
  reward: ["Reward", r => r.reward],
};
const SUMMARY = {
  reward: ["Reward"], answer_reward: ["Answer reward"], format_reward: ["Format reward"],
  response_length: ["Length", "tokens", 0],
  response_length_correct: ["Length, correct", "tokens", 0],
  response_length_incorrect: ["Length, incorrect", "tokens", 0],
  response_entropy: ["Entropy", "nats"], reward_failures: ["Reward failures"],
};

records.forEach((r, place) => {
  r.index ??= place;
  r.verdict = verdictOf(r);
});
const samples = new Map();  // how many each prompt has
for (const r of records) samples.set(r.index, (samples.get(r.index) ?? 0) + 1);

function card(r) {
  const several = samples.get(r.index);
  const header = el("header", focusLink(r), el("span.verdict", VERDICTS[r.verdict]),
    several > 1 ? el("span.dim", `sample ${(r.sample ?? 0) + 1} of ${several}`) : null,
    el("span.facts", ...facts(r)), rewardError(r));
  const article = el("article.card", header, el("div.left", el("div", ...promptParts(r), expected(r.ground_truth))),
    el("div.right", el("h2", "Response"), generated(r)));
  article.classList.add(r.verdict);
  return article;
}

function tellIndex(message) {  // around this page
  if (parent !== window) parent.postMessage({page: "lightning_sft", ...message}, "*");
}
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

start({
  title, summary, labels: SUMMARY, records, filters: FILTERS, sorts: SORTS, card, tell: tellIndex,
  count: num_records > records.length
    ? `the first ${number(records.length)} of ${number(num_records)} records` : `${number(num_records)} records`,
  defaults: {filter: "all", q: "", sort: "number", colour: "entropy", prompt: ""},
  focus: {key: "prompt", name: "Prompt"},
  texts: r => [r.prompt, r.response, r.ground_truth],
});
const at = new URLSearchParams(location.hash.slice(1)).get("at");
if (at && !state.prompt) goTo(at);
