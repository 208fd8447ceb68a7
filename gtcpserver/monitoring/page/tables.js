// -- tables: latency, errors, workers, connections -----------------------------------------------------------------------
function requestsOf(status) {
  const latency = status.stats.latency || {};
  return Object.keys(latency).reduce((sum, key) => key === "sum" ? sum : sum + latency[key], 0);
}

function short(s) { return s < 0.001 ? s * 1e6 + "µs" : s < 1 ? s * 1000 + "ms" : s < 60 ? s + "s" : s / 60 + "min"; }
function drawLatency(status, view) {
  const all = status.stats.latency || {}, names = view.buckets();
  let counts = names.map(name => view.happened(name)), seconds = view.happened("latency_sum");
  let total = counts.reduce((a, b) => a + b, 0), words = view.range.words;
  if (!(total >= 0.5)) {
    words = "since the start";
    counts = names.map(name => all[name.slice(8)] || 0);
    [total, seconds] = [requestsOf(status), all.sum || 0];
  }
  say("latency-note", total ? `${words}, ${counted(total, "request")}` : "no request has ended yet");
  for (const [id, share] of [["p50", .5], ["p95", .95], ["p99", .99]]) say(id, total ? span(percentile(names, counts, share)) : "–");
  say("mean", total ? span(seconds / total) : "–");
  const bars = at("bars"), scale = at("scale"), top = Math.max(...counts, 1);
  if (bars.children.length !== names.length) {
    bars.replaceChildren(...names.map(() => make("div")));
    scale.replaceChildren(...names.map(name => make("span", isFinite(bound(name)) ? short(bound(name)) : "more")));
  }
  const described = names.map((name, i) => `${isFinite(bound(name)) ? "up to " + span(bound(name)) : "more"}: ${whole(counts[i])}`);
  names.forEach((_, i) => {
    bars.children[i].style.height = (counts[i] ? Math.max(2, 100 * counts[i] / top) : 0) + "%";
    bars.children[i].title = described[i];
  });
  bars.setAttribute("aria-label", "Requests by their time: " + described.filter((_, i) => counts[i]).join(", "));
}

const KINDS = {
  handler_errors: "handler failed", rejected: "rejected: full", handler_timeouts: "handler took too long",
  accept_errors: "accept failed", blocked: "event loop blocked", resets: "client reset or vanished", timeouts: "timeout",
  limits_exceeded: "limit exceeded", slow_clients: "client too slow", refused: "refused by on_connect",
  clients_refused: "refused by client_limits", handshake_failures: "handshake failed",
  proxy_header_failures: "bad PROXY header", tls_floods: "TLS flood", left_in_queue: "reset before accept",
};
function drawErrors(status, view) {
  say("recent", view.range.words);
  const rows = Object.entries(KINDS).filter(([name]) => ONE(status.stats[name]))
    .map(([name, kind]) => [name, kind, Math.round(view.happened(name)), status.stats[name]])
    .sort((a, b) => b[2] - a[2] || ONE(b[3]) - ONE(a[3]))
    .map(([name, kind, recent, count]) => {
      const row = make("tr"), cell = make("td", kind, "peer"), tone = recent ? FAULTS.includes(name) ? " bad" : " warn" : "";
      if (typeof count === "object") cell.append(" ", make("small", Object.entries(count).sort((a, b) => b[1] - a[1]).map(([what, n]) => `${what} ${whole(n)}`).join(", "), "note"));
      row.append(cell, make("td", whole(recent), "number" + tone), make("td", whole(ONE(count)), "number"));
      return row;
    });
  at("errors").replaceChildren(...rows);
  at("errors").parentNode.hidden = !rows.length;
  at("no-errors").hidden = rows.length > 0;
}

let before = null;       // the status of some seconds ago, for the CPU of each worker
function shareOf(worker, status, key) {
  const old = before && before.status.workers.find(one => one.pid === worker.pid), took = before ? (performance.now() - before.at) / 1000 : 0;
  return old && took > 0.5 ? Math.max(0, (worker.stats[key] || 0) - (old.stats[key] || 0)) / took : NaN;
}
function drawWorkers(status) {
  at("workers").replaceChildren(...status.workers.map(worker => {
    const row = make("tr"), cpu = shareOf(worker, status, "cpu_seconds"), state = make("td"), [word, tone] = stateOf(worker);
    state.append(make("span", word, "pill " + tone));
    const meter = make("div", undefined, "meter wide"), cpuCell = make("td");
    meter.append(make("i"));
    fillMeter(meter, cpu, 0.95);
    cpuCell.append(meter, document.createTextNode(percent(cpu)));
    row.append(make("td", worker.number + ""), state, make("td", worker.pid + "", "wide"),
      make("td", whole(worker.active), "number"), make("td", few(shareOf(worker, status, "accepted")), "number wide"), cpuCell,
      make("td", amount(worker.rss), "number"), make("td", span(worker.lag), "number" + (worker.lag > LATE ? " bad" : "")), make("td", span(worker.uptime), "number wide"));
    return row;
  }));
  const more = (status.retired ? `, ${whole(status.retired)} retired` : "") +
    (status.restarts ? `, ${whole(status.restarts)} restarted` : "") +
    (status.stats.moved ? `, ${whole(status.stats.moved)} connections moved` : "") +
    Object.entries(status.stats.staying || {}).map(([why, n]) => `, ${whole(n)} stay: ${why}`).join("");
  say("workers-note", `${status.workers.filter(one => stateOf(one)[0] === "ready").length} of ${status.target} ready${more}`);
}

// -- connections: looked at on demand, then sorted, filtered and searched here --------------------------------------------
const whereOf = one => one.idle ? "idle" : [...one.where].reverse().join(" < ") || "not started";
const placeOf = one => one.idle ? "idle" : one.where.length ? one.where[one.where.length - 1].slice(0, 100) : "not started";
const tlsOf = one => one.tls ? one.tls + (one.server_name ? " " + one.server_name : "") : "no";
const COLUMNS = [
  ["client", one => one.peer], ["age", one => one.age], ["where its handler stands", whereOf], ["in", one => one.bytes_received],
  ["out", one => one.bytes_sent], ["TLS", tlsOf], ["worker", one => one.worker || 0],
];
const NUMBERS = ["age", "in", "out"];
const table = { found: null, sort: "age", down: true, kind: "all", place: null };

function drawColumns() {
  at("columns").replaceChildren(...COLUMNS.map(([name]) => {
    const cell = make("th", undefined, NUMBERS.includes(name) ? "number" : ""), button = make("button", name + (table.sort === name ? table.down ? " ↓" : " ↑" : ""));
    button.type = "button";
    cell.scope = "col";
    if (table.sort === name) cell.setAttribute("aria-sort", table.down ? "descending" : "ascending");
    button.addEventListener("click", () => {
      table.down = table.sort === name ? !table.down : NUMBERS.includes(name);
      table.sort = name;
      drawColumns();
      drawRows();
      at("columns").children[COLUMNS.findIndex(one => one[0] === name)].firstChild.focus();
    });
    cell.append(button);
    return cell;
  }));
}
function drawPlaces() {
  const places = Object.entries(table.found.places || {}).sort((a, b) => b[1] - a[1]), most = Math.max(...places.map(one => one[1]), 1);
  at("places").replaceChildren(...places.map(([place, n]) => {
    const item = make("li"), button = make("button"), meter = make("div", undefined, "meter");
    button.type = "button";
    button.setAttribute("aria-pressed", table.place === place);
    button.setAttribute("aria-label", `${n} at ${place}`);
    meter.append(make("i"));
    fillMeter(meter, n / most, 2);
    button.append(make("b", whole(n)), make("span", place), meter);
    button.addEventListener("click", () => {
      table.place = table.place === place ? null : place;
      for (const one of at("places").querySelectorAll("button")) one.setAttribute("aria-pressed", one === button && table.place !== null);
      drawRows();
    });
    item.append(button);
    return item;
  }));
}
function drawRows() {
  const words = at("search").value.trim().toLowerCase(), value = COLUMNS.find(one => one[0] === table.sort)[1], listed = new Set(Object.keys(table.found.places || {}));
  const rows = table.found.connections.filter(one =>
    (table.kind === "all" || one.idle === (table.kind === "idle")) &&
    (table.place === null || placeOf(one) === table.place || table.place === "elsewhere" && !listed.has(placeOf(one))) &&
    (!words || [one.peer, whereOf(one), tlsOf(one)].some(text => text.toLowerCase().includes(words))));
  rows.sort((a, b) => {
    const [x, y] = [value(a), value(b)], order = typeof x === "number" ? x - y : x.localeCompare(y, "en", { numeric: true });
    return table.down ? -order : order;
  });
  at("rows").replaceChildren(...rows.map(one => {
    const row = make("tr"), where = make("td", undefined, "where");
    if (one.idle) where.append(make("span", "idle", "pill"));
    else where.textContent = whereOf(one);
    row.append(make("td", one.peer, "peer"), make("td", span(one.age), "number"), where,
      make("td", amount(one.bytes_received), "number"), make("td", amount(one.bytes_sent), "number"),
      make("td", tlsOf(one), "peer"), make("td", (one.worker || 0) + ""));
    return row;
  }));
  say("found", rows.length === table.found.connections.length ? "" : `${whole(rows.length)} of ${whole(table.found.connections.length)}`);
}
async function showConnections() {
  const button = at("show");
  button.disabled = true;
  try {
    const found = table.found = await ask("connections");
    if (table.place !== null && !(table.place in (found.places || {}))) table.place = null;
    drawPlaces();
    drawRows();
    const number = found.connections.length, missing = found.missing.length ? `; no answer from worker ${found.missing.join(", ")}` : "";
    say("connections-note", `${whole(number)} of ${whole(Math.max(number, found.total))}, at ${clock(Date.now() / 1000, true)}${missing}`);
    at("connections").hidden = !number;
    button.textContent = "Look again";
  } catch (error) {
    say("connections-note", "no answer: " + error.message);
  }
  button.disabled = false;
}
at("show").addEventListener("click", showConnections);
at("search").addEventListener("input", drawRows);
choice("kinds", ["all", "idle", "busy"], "all", kind => { table.kind = kind; drawRows(); });
drawColumns();
