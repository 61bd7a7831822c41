const COLOURS = {
  entropy: ["Entropy", "0", "3+ nats"],
  log_prob: ["Log-prob", "100 %", "≤ 1 %"],
  none: ["None"],
};

const percent = logProb => logProb == null ? "–" : +(100 * Math.exp(logProb)).toPrecision(3) + " %";
const codePoint = char => "⟨U+" + char.codePointAt(0).toString(16).toUpperCase().padStart(4, "0") + "⟩";
const MARKS = {" ": "·", "\n": "↵", "\t": "⇥"};
const visible = text => text.replace(/[\s\p{C}]/gu, char => MARKS[char] ?? codePoint(char));

// -- tokens and their shades

// Ten shades of entropy and ten of log-prob; the power lets small differences near 0 be seen.
const shade = share => Math.round(10 * Math.min(share, 1) ** 0.7) || 0;
const shades = (entropy, logProb) => `t e${shade(entropy / 3)} p${shade(-logProb / Math.log(100))}`;

// The tokens up to `to` of a record `r`: several if only the last completes their character.
function tokenSpan(r, from, to) {
  const span = document.createElement("span"), [start, ...lines] = r.tokens[to].split("\n");
  const entropy = Math.max(...r.token_entropies.slice(from, to + 1));
  const logProbs = r.token_log_probs.slice(from, to + 1);
  span.className = shades(entropy, Math.min(...logProbs)) + (logProbs.every(each => each == null) ? " context" : "");
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
function colourTokens(colour) {
  document.documentElement.dataset.colour = colour;
  $("colours").querySelectorAll("button").forEach(each => press(each, each.dataset.colour === colour));
  const [, low, high] = COLOURS[colour], steps = [...Array(7).keys()];
  const scale = steps.map(i => Object.assign(el("span"), {className: shades(i / 2, -i / 6 * Math.log(100))}));
  $("legend").replaceChildren(...(low ? [low, ...scale, high] : []));
}

// -- what a token under the pointer, a finger or the arrow keys tells; the response around it has the record

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
  const {record: r} = span.closest(".response"), places = [];
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
function showNext(response, move) {  // the tip of the token after or before the current one
  const spans = [...response.querySelectorAll(".t")], next = spans[current ? spans.indexOf(current) + move : 0];
  if (!next) return;
  next.scrollIntoView({block: "nearest"});
  showTip(next);
}
$("list").addEventListener("pointerover", ({target}) => {
  const span = target.closest(".t");
  if (span) showTip(span); else hideTip();
});
$("list").addEventListener("pointerleave", hideTip);
addEventListener("scroll", hideTip, {passive: true});
