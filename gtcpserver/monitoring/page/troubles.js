// -- troubles: what is bad now, and what was bad when -------------------------------------------------------------------
const LATE = 0.25;       // seconds by which the event loop of a worker may be late: it gets no new connections then
const STANDS_STILL = 1;
const NEARLY_FULL = 0.9;
const SHARE = 0.01;      // of all connections: what clients do now and then is no trouble
const WEEKS = 14 * 86400;
const LATELY = 300;
const TEXTS = {
  handler_errors: ["handler", "failed"], accept_errors: ["accept", "failed"],
  rejected: ["connection", "rejected: the server was full"], handler_timeouts: ["handler", "ended: it took too long"],
  blocked: ["block", "of the event loop"],
  resets: ["connection", "reset by the client, or vanished"], timeouts: ["connection", "timed out"],
  limits_exceeded: ["connection", "exceeded a limit"], slow_clients: ["connection", "too slow"],
  refused: ["connection", "refused by on_connect"], clients_refused: ["connection", "refused by client_limits"],
  handshake_failures: ["connection", "failed in the handshake"],
  proxy_header_failures: ["connection", "without a good PROXY header"], tls_floods: ["connection", "with a TLS flood"],
  left_in_queue: ["connection", "reset before accept"],
};

// A worker whose event loop stands still is not ready, whatever it has said before.
function stateOf(worker) {
  if (worker.state !== "ready") return [worker.state, { starting: "warn", stopping: "warn", killed: "bad" }[worker.state] || ""];
  if (worker.lag > STANDS_STILL) return ["stands still", "bad"];
  return worker.lagging || worker.lag > LATE ? ["late", "bad"] : ["ready", "good"];
}

function conditions(view) {
  return view.cache.conditions || (view.cache.conditions = Array.from({ length: view.count }, (_, i) => {
    const value = name => view.columns(name)[i], times = name => (value(name) || 0) * view.seconds(), reasons = [];
    const add = (tone, text) => reasons.push([tone, text]);
    if (isNaN(value("ready"))) return { tone: "unknown", reasons: [["", "not known"]] };
    if (value("ready") === 0) add("bad", "not ready");
    else if (value("ready") < value("wanted")) add("bad", `${value("ready")} of ${counted(value("wanted"), "worker")} ready`);
    if (value("lag") > LATE) add(value("lag") > STANDS_STILL ? "bad" : "warn", `event loop ${span(value("lag"))} late`);
    if (value("pool_used") >= 1) add("bad", "pool full");
    else if (value("pool_used") > NEARLY_FULL) add("warn", `pool ${percent(value("pool_used"))} full`);
    for (const name of FAULTS) if (times(name) > 0) add("bad", `${counted(Math.max(1, times(name)), TEXTS[name][0])} ${TEXTS[name][1]}`);
    for (const name of OF_CLIENTS) if (times(name) > 0 && value(name) >= SHARE * value("accepted")) add("warn", `${counted(Math.max(1, times(name)), TEXTS[name][0])} ${TEXTS[name][1]}`);
    for (const [name, text] of Object.entries(EVENTS)) if (value(name) > 0) add(name === "died" ? "bad" : "", text);
    const tone = ["bad", "warn"].find(one => reasons.some(([tone]) => tone === one)) || "good";
    return { tone, reasons };
  }));
}

function certificatesOf(status) {
  const told = status.workers.map(one => one.stats).filter(one => one.certificates);
  if (!told.length) return null;
  return { number: Math.max(...told.map(one => one.certificates)), left: Math.min(...told.map(one => one.certificate_expires_at)) - Date.now() / 1000 };
}
function inDays(seconds) {
  if (seconds <= 0) return "has expired";
  return seconds < 2 * 86400 ? `expires in ${span(seconds)}` : `expires in ${whole(Math.floor(seconds / 86400))} days`;
}

const ONE = sum => typeof sum === "object" ? Object.values(sum).reduce((a, b) => a + b, 0) : sum || 0;
function troublesOf(status) {
  const { stats, workers } = status, found = [];
  const add = (bad, text, more) => found.push([bad, text, more]);
  const ready = workers.filter(one => stateOf(one)[0] === "ready").length;
  if (!status.ready) add(true, `Not ready: ${status.maintenance ? "maintenance" : status.state}`);
  else if (ready < status.target) add(true, `${ready} of ${counted(status.target, "worker")} ready`);
  for (const one of workers) {
    if (one.state === "killed") add(true, `Worker ${one.number} (pid ${one.pid}) is being killed`);
    if (one.lagging || one.lag > LATE) add(true, `Worker ${one.number} (pid ${one.pid}): event loop ${span(one.lag)} late`);
  }
  const size = stats.pool_size, running = stats.handlers || 0;
  if (size && running >= size) add(true, `Pool full: ${whole(running)} of ${whole(size)} handlers running`, "new clients wait or are rejected");
  else if (size && running > NEARLY_FULL * size) add(false, `Pool nearly full: ${whole(running)} of ${whole(size)} handlers running`);
  const certificates = certificatesOf(status);
  if (certificates && certificates.left < WEEKS) add(certificates.left <= 0, `${counted(certificates.number, "certificate")}, the first ${inDays(certificates.left)}`);
  // What has happened in the last hour. The charts have what was before.
  const tell = (name, noun, text) => {
    const hour = Math.round(SECONDS.happened(name, 3600)), lately = Math.round(SECONDS.happened(name, LATELY));
    if (hour) add(lately > 0, `${counted(hour, noun)} ${text}`, `in the last hour, last at ${clock(SECONDS.lastTime(name), true)}`);
  };
  tell("died", "worker", "died");
  for (const name of FAULTS) tell(name, ...TEXTS[name]);
  const accepted = SECONDS.happened("accepted", 3600);
  for (const name of OF_CLIENTS) {
    const hour = Math.round(SECONDS.happened(name, 3600)), share = hour / Math.max(accepted, 1);
    if (hour && share >= SHARE) add(false, `${counted(hour, TEXTS[name][0])} ${TEXTS[name][1]}`, `in the last hour, ${percent(Math.min(1, share))} of all`);
  }
  return found.sort((a, b) => b[0] - a[0]);
}
function drawTroubles(found) {
  at("trouble-list").replaceChildren(...found.map(([bad, text, more]) => {
    const item = make("li", text, bad ? "bad" : "warn");
    if (more) item.append(" ", make("small", more));
    return item;
  }));
  at("troubles").hidden = !found.length;
}
