const {title, summary, num_rows, rows} = JSON.parse($("data").textContent);

const HIGHEST = 3;  // per cent of all rows
const RARE = Math.log(0.01);
const highest = new Set([...rows].sort((a, b) => b.loss - a.loss).slice(0, Math.ceil(num_rows * HIGHEST / 100)));
for (const r of rows) {
  r.least = (r.token_log_probs ?? []).reduce((least, logProb) => Math.min(least, logProb ?? 0), 0);
}

const FILTERS = {
  all: ["All", () => true],
  highest: [`Highest ${HIGHEST} % of losses`, r => highest.has(r), "Wrong responses are often among these"],
  rare: ["A token below 1 %", r => r.least < RARE, "The model gave less than 1 % to at least one learnt token"],
  known: ["Loss below 0.1", r => r.loss != null && r.loss < 0.1, "Learnt by heart, or trivial"],
};
const SORTS = {
  loss: ["Loss", r => r.loss],
  share: ["Share of the loss", r => r.share],
  length: ["Length", r => r.num_tokens],
  learnt: ["Learnt tokens", r => r.response_length],
  entropy: ["Entropy", r => r.token_entropy],
  accuracy: ["Accuracy", r => r.accuracy, true],
  number: ["Number", r => r.index, true],
};
const SUMMARY = {
  loss: ["Loss", "nats"], perplexity: ["Perplexity"], token_accuracy: ["Accuracy", "%", 1, 100],
  token_entropy: ["Entropy", "nats"], num_rows: ["Rows"],
};

function fact(label, value, meaning) {
  const element = el("span", label + " ", el("b", value));
  element.title = meaning;
  return element;
}
function card(r) {
  const header = el("header", focusLink(r), el("span.location", r.location ?? "–"),
    el("span.verdict", `loss ${number(r.loss)}`),
    el("span.facts",
      fact("share", `${number(r.share)} %`, "of the loss of all rows"),
      fact("learnt", `${number(r.response_length)} of ${number(r.num_tokens)} tokens`, ""),
      fact("entropy", `${number(r.token_entropy)} nats`, "mean of the learnt tokens"),
      fact("accuracy", `${number(r.accuracy == null ? null : 100 * r.accuracy, 1)} %`,
        "learnt tokens that are the model's first choice")));
  const right = el("div.right", el("h2", "Response"), responseText(r));
  const article = el("article.card", header, r.prompt ? el("div.left", el("div", ...promptParts(r))) : null, right);
  article.classList.toggle("whole", !r.prompt);
  article.classList.toggle("high", highest.has(r));
  return article;
}

start({
  title, summary, labels: SUMMARY, records: rows, filters: FILTERS, sorts: SORTS, card,
  count: num_rows > rows.length
    ? `the ${number(rows.length)} rows with the highest loss, of ${number(num_rows)} that were scored`
    : `${number(num_rows)} rows`,
  defaults: {filter: "all", q: "", sort: "-loss", colour: "log_prob", row: ""},
  focus: {key: "row", name: "Row"},
  texts: r => [r.prompt, r.response, r.location],
});
