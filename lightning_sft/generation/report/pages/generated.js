// -- what is known of a response that a model has generated

const VERDICTS = {correct: "✓ Correct", answer: "✗ Wrong answer", format: "⊘ Wrong format", unscored: "– Unscored"};
const ENDS = {eos: "ended by EOS", stop: "ended by stop string", length: "✂ cut off"};

function verdictOf(r) {
  if (r.answer_reward > 0) return "correct";
  if (r.format_reward != null && r.format_reward <= 0) return "format";
  return r.answer_reward != null ? "answer" : "unscored";
}
function facts(r) {
  return [
    el("span", `reward ${number(r.reward)}`),
    el("span", `${number(r.response_length)} tokens`),
    el("span", `${number(r.token_entropy)} nats`),
    el(r.stop_reason === "length" ? "span.cut" : "span", ENDS[r.stop_reason] ?? r.stop_reason ?? "–"),
  ];
}
const rewardError = r => r.reward_error != null ? el("span.error", "⚠ reward failed: " + r.reward_error) : null;
const expected = groundTruth => el("div.expected", el("h2", "Expected"), el("div.text", groundTruth ?? "–"));
function generated(r) {
  const response = responseText(r);
  if (r.stop_reason === "eos") response.lastElementChild?.classList.add("eos");
  return response;
}
