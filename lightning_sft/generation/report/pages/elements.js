"use strict";
const $ = id => document.getElementById(id);

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
