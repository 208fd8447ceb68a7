
"use strict";
// -- figures: how numbers are written, and elements made ---------------------------------------------------------------
const at = id => document.getElementById(id);
const say = (id, text) => { const node = at(id); if (node.textContent !== text) node.textContent = text; };

function make(tag, text, classes) {
  // Text is only ever put in as text: clients choose some of it.
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (classes) node.className = classes;
  return node;
}
function draw(tag, attributes, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

function whole(n) { return isFinite(n) ? Math.round(n).toLocaleString("en") : "–"; }
function counted(n, noun) { return `${whole(n)} ${noun}${Math.round(n) === 1 ? "" : "s"}`; }
function few(n) {
  if (!isFinite(n)) return "–";
  return n === 0 ? "0" : n < 0.1 ? n.toFixed(n < 0.01 ? 3 : 2) : n < 10 ? n.toFixed(1) : whole(n);
}
function perSecond(n) { return few(n) + (isFinite(n) ? "/s" : ""); }
function percent(share) { return isFinite(share) ? whole(100 * share) + " %" : "–"; }
function bytes(n) {
  if (!isFinite(n)) return ["–", ""];
  const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
  let unit = 0;
  while (n >= 1024 && unit < units.length - 1) { n /= 1024; unit++; }
  return [(unit && n < 100 ? n.toFixed(1) : Math.round(n)) + "", units[unit]];
}
function span(s) {
  if (!isFinite(s)) return "–";
  if (s < 0.001) return Math.round(s * 1e6) + " µs";
  if (s < 1) return (s * 1000).toFixed(s < 0.01 ? 1 : 0) + " ms";
  if (s < 60) return s.toFixed(s < 10 ? 1 : 0) + " s";
  if (s < 5400) return Math.round(s / 60) + " min";
  return s < 172800 ? (s / 3600).toFixed(1) + " h" : Math.round(s / 86400) + " days";
}
function figure(id, value, unit, tone) {
  const node = at(id);
  node.replaceChildren(document.createTextNode(value + (unit ? "\u202f" : "")), ...(unit ? [make("small", unit)] : []));
  for (const one of ["bad", "warn"]) node.classList.toggle(one, tone === one);
}
function fillMeter(node, share, hot = 0.9) {
  node.classList.toggle("hot", share > hot);
  node.firstChild.style.width = Math.min(100, 100 * (share || 0)) + "%";
}
function clock(seconds, precise) {
  const options = { hour: "2-digit", minute: "2-digit", hourCycle: "h23" };
  return new Date(1000 * seconds).toLocaleTimeString("en", precise ? { ...options, second: "2-digit" } : options);
}

// Buttons of which one is pressed.
function choice(id, names, chosen, choose) {
  const buttons = names.map(name => {
    const button = make("button", name);
    button.type = "button";
    button.setAttribute("aria-pressed", name === chosen);
    button.addEventListener("click", () => {
      for (const one of buttons) one.setAttribute("aria-pressed", one === button);
      choose(name);
    });
    return button;
  });
  at(id).replaceChildren(...buttons);
}

async function ask(path, read = answer => answer.json(), patience = 4) {
  const stop = new AbortController(), timer = setTimeout(() => stop.abort(), 1000 * patience);
  try {
    const answer = await fetch(path, { signal: stop.signal, cache: "no-store" });
    if (!answer.ok) throw new Error(await answer.text());
    return await read(answer);
  } finally {
    clearTimeout(timer);
  }
}
