// -- live: ask every second, and draw --------------------------------------------------------------------------------------
const SMOOTH = 4;        // seconds that a rate is taken over: workers tell their counters once a second
const HIDDEN = 10;       // seconds between two questions while nobody looks: the title and the icon still tell the state
const kept = [];
let range = "", status = null, dayAt = -Infinity;

function setState(word, tone, name) {
  say("state", word);
  at("state").className = "pill " + tone;
  const icon = `icon-${tone || "warn"}.svg`;
  if (at("icon").getAttribute("href") !== icon) at("icon").setAttribute("href", icon);
  document.title = `${word} · ${name || "gtcpserver"}`;
}

function drawFigures() {
  const { stats } = status, recent = name => SECONDS.recent(name, SMOOTH), of = (id, key, note) => {
    const [value, unit] = bytes(recent(key));
    figure(id, value, unit && unit + "/s");
    say(id + "-note", note);
  };
  const added = names => names.reduce((sum, name) => sum + recent(name), 0);
  const requests = added(Object.keys(SECONDS.series).filter(name => name.startsWith("latency_") && name !== "latency_sum"));
  const known = SECONDS.last > 0, faults = added(FAULTS), clients = added(OF_CLIENTS);
  figure("requests", few(known ? requests : NaN), "/s");
  figure("faults", few(faults), "/s", faults > 0 && "bad");
  figure("clients", few(clients), "/s", clients > 0 && "warn");
  say("all-requests", whole(requestsOf(status)));
  figure("active", whole(stats.active || 0));
  say("active-note", `${whole(stats.idle || 0)} idle, ${whole(stats.peak || 0)} at most`);
  figure("accepts", few(recent("accepted")), "/s");
  say("accepts-note", `${whole(stats.accepted || 0)} in all`);
  const size = stats.pool_size, running = stats.handlers || 0, share = size ? running / size : 0;
  figure("pool", whole(running), size === null ? "no limit" : `of ${whole(size || 0)}`, share >= 1 ? "bad" : share > NEARLY_FULL && "warn");
  say("pool-note", size ? `${percent(share)} of the pool` : "running");
  const late = Math.max(0, ...status.workers.map(one => one.lag));
  figure("lag", ...span(late).split(" "), late > STANDS_STILL ? "bad" : late > LATE && "warn");
  say("lag-note", status.workers.length === 1 ? "in the last seconds" : "of the slowest worker");
  const cpu = recent("cpu");
  figure("cpu", whole(100 * cpu), "%");
  say("cpu-note", `of a core, ${span(stats.cpu_seconds || 0)} in all`);
  figure("memory", ...bytes(status.workers.reduce((sum, one) => sum + one.rss, 0)));
  say("memory-note", status.workers.length === 1 ? "resident" : `resident, ${status.workers.length} processes`);
  of("received", "bytes_received", amount(stats.bytes_received || 0) + " in all");
  of("sent", "bytes_sent", amount(stats.bytes_sent || 0) + " in all");
}

function drawAll() {
  const troubles = troublesOf(status), worst = troubles.length ? troubles[0][0] ? "bad" : "warn" : "good";
  const view = shown.view = new View(RANGES[range]), certificates = certificatesOf(status);
  document.body.classList.remove("stale");
  const waiting = status.ready && !status.workers.some(one => stateOf(one)[0] === "ready");
  setState(status.ready ? waiting ? "stands still" : "ready" : status.state, status.ready ? waiting ? "bad" : "good" : "warn", status.name);
  if (status.ready && !waiting && worst !== "good") at("icon").setAttribute("href", `icon-${worst}.svg`);
  say("name", status.name || "gtcpserver");
  say("about", `${status.addresses.join(", ")} · up ${span(status.uptime)} · gtcpserver ${status.version} · pid ${status.pid}` +
    (certificates ? ` · ${counted(certificates.number, "certificate")}, the first ${inDays(certificates.left)}` : ""));
  say("traffic-note", view.range.words);
  drawTroubles(troubles);
  drawFigures();
  drawLatency(status, view);
  drawErrors(status, view);
  drawWorkers(status);
  drawCharts();
  say("foot", `Updated ${clock(Date.now() / 1000, true)}. Rates are of the last ${SMOOTH} seconds; the charts are of what the server has recorded, ${RANGES[range].past === DAY ? "minute by minute" : "second by second"}.`);
}

async function look() {
  try {
    const asked = [ask("stats"), SECONDS.follow()];
    if (range === "1 day") asked.push(followDay());
    [status] = await Promise.all(asked);
    if (!range) await begin();
    kept.push({ at: performance.now(), status });
    if (kept.length > SMOOTH + 1) kept.shift();
    before = kept.length > 1 ? kept[0] : null;
    drawAll();
  } catch (error) {
    document.body.classList.add("stale");
    setState("no answer", "bad", status && status.name);
    drawTroubles([[true, "No answer", `${error.message.trim()}; what is below is from before`]]);
  }
  clearTimeout(look.timer);
  look.timer = setTimeout(look, 1000 * (document.hidden ? HIDDEN : 1));
}

// What the address asks for, or what is enough for all that is known.
async function begin() {
  const asked = decodeURIComponent(location.hash.slice(1)).replace("-", " ");
  range = asked in RANGES ? asked : isNaN(SECONDS.known("ready", SECONDS.last - 300)) ? "5 min" : "1 hour";
  choice("ranges", Object.keys(RANGES), range, choose);
  if (range === "1 day") await followDay();
}
async function followDay() {
  if (performance.now() - dayAt < 15000) return;
  dayAt = performance.now();
  await DAY.follow();
}
async function choose(chosen) {
  range = chosen;
  shown.pointed = null;
  window.history.replaceState(null, "", "#" + range.replace(" ", "-"));
  if (range === "1 day") await followDay().catch(() => {});
  if (status) drawAll();
}
document.addEventListener("visibilitychange", () => { if (!document.hidden) { clearTimeout(look.timer); look(); } });
addEventListener("resize", drawCharts);
look();
