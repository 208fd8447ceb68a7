// -- history: what the server has recorded -----------------------------------------------------------------------------
const FAULTS = ["handler_errors", "accept_errors", "rejected", "handler_timeouts", "blocked"];
const OF_CLIENTS = [
  "resets", "timeouts", "limits_exceeded", "slow_clients", "refused", "clients_refused", "handshake_failures",
  "proxy_header_failures", "tls_floods", "left_in_queue",
];
const WORST = { lag: Math.max, pool_used: Math.max, wanted: Math.max, ready: Math.min };

// The same ring as the server's: of each series a float for each slot, at its number modulo their number.
class Past {
  constructor(grain, step, slots) { Object.assign(this, { grain, step, slots, last: 0, endsAt: 0, silent: 0, series: {} }); }

  async follow() {
    const data = await ask(`history?grain=${this.grain}&since=${this.last}`, answer => answer.arrayBuffer(), 10);  // seconds, all that the server gives
    const end = new Uint8Array(data).indexOf(10) + 1;
    const head = JSON.parse(new TextDecoder().decode(new Uint8Array(data, 0, end)));
    this.silent = head.count ? 0 : this.silent + 1;
    if (this.silent > 5) this.last = this.silent = 0;  // another machine's clock: begin again
    if (!head.count) return;
    const view = new DataView(data);
    head.series.forEach((name, index) => {
      const ring = this.series[name] || (this.series[name] = new Float32Array(this.slots).fill(NaN));
      for (let number = Math.max(this.last + 1, head.first - this.slots); number < head.first; number++) ring[number % this.slots] = NaN;
      for (let i = 0; i < head.count; i++) ring[(head.first + i) % this.slots] = view.getFloat32(end + 4 * (index * head.count + i), true);
    });
    this.last = head.first + head.count - 1;
    this.endsAt = head.ends_at;
  }

  time(number) { return this.endsAt - (this.last + 1 - number) * this.step; }
  known(name, number) { return number > this.last - this.slots && number <= this.last && this.series[name] ? this.series[name][number % this.slots] : NaN; }

  // Slots from one number on, as one value: the mean of what is known, or the worst.
  over(name, first, count) {
    const ring = this.series[name], join = WORST[name];
    let found = NaN, known = 0;
    if (!ring) return NaN;
    for (let number = Math.max(first, this.last - this.slots + 1, 1); number < first + count && number <= this.last; number++) {
      const value = ring[number % this.slots];
      if (isNaN(value)) continue;
      known++;
      found = isNaN(found) ? value : join ? join(found, value) : found + value;
    }
    return join || !known ? found : found / known;
  }

  // How often something counted happened in the last so many seconds.
  happened(name, seconds) {
    const ring = this.series[name], count = Math.min(this.slots, Math.round(seconds / this.step));
    let sum = 0;
    if (ring) for (let i = 0; i < count; i++) sum += ring[(this.last - i + this.slots * 2) % this.slots] || 0;
    return sum * this.step;
  }
  lastTime(name) {
    for (let i = 0; i < this.slots; i++) if (this.known(name, this.last - i) > 0) return this.time(this.last - i);
    return NaN;
  }
  recent(name, seconds = 4) { return this.over(name, this.last - Math.round(seconds / this.step) + 1, Math.round(seconds / this.step)); }
}

const SECONDS = new Past("second", 1, 3600), DAY = new Past("minute", 60, 1440);
// Name, ring, slots, slots of a column, seconds between two labels of the axis (and on a phone).
const RANGES = {
  "5 min": { past: SECONDS, slots: 300, per: 2, tick: 60, seldom: 120, words: "last 5 min" },
  "1 hour": { past: SECONDS, slots: 3600, per: 15, tick: 600, seldom: 1200, words: "last hour" },
  "1 day": { past: DAY, slots: 1440, per: 5, tick: 10800, seldom: 21600, words: "last day" },
};

// What is shown of a ring: columns, each for some slots. Numbers of columns are absolute, so that they stand still while time goes by.
class View {
  constructor(range) {
    this.range = range;
    this.past = range.past;
    this.count = range.slots / range.per;
    this.end = Math.floor(range.past.last / range.per);  // the newest column
    this.first = this.end - this.count + 1;
    this.cache = {};
  }
  seconds() { return this.range.per * this.past.step; }
  // How often something was counted in all of it. The minute that has not ended yet is known by its seconds.
  happened(name) {
    let sum = this.past.happened(name, this.range.slots * this.past.step);
    if (this.past === DAY) for (let number = Math.max(60 * (DAY.last + 1), SECONDS.last - 3599); number <= SECONDS.last; number++) sum += SECONDS.known(name, number) || 0;
    return sum;
  }
  time(column) { return this.past.time((this.first + column) * this.range.per); }
  columns(name) {
    return this.cache[name] || (this.cache[name] = Array.from({ length: this.count }, (_, i) => this.past.over(name, (this.first + i) * this.range.per, this.range.per)));
  }
  added(names) { return Array.from({ length: this.count }, (_, i) => names.length ? names.reduce((sum, name) => sum + this.columns(name)[i], 0) : NaN); }
  buckets() { return Object.keys(this.past.series).filter(name => name.startsWith("latency_") && name !== "latency_sum"); }
  requests() { return this.cache.requests || (this.cache.requests = this.added(this.buckets())); }
  percentiles() {
    if (!this.cache.percentiles) {
      const names = this.buckets(), columns = names.map(name => this.columns(name));
      this.cache.percentiles = { p50: [], p95: [], p99: [] };
      for (let i = 0; i < this.count; i++) {
        const counts = columns.map(one => one[i] || 0);
        for (const [name, share] of [["p50", 0.5], ["p95", 0.95], ["p99", 0.99]]) this.cache.percentiles[name].push(percentile(names, counts, share));
      }
    }
    return this.cache.percentiles;
  }
}

function bound(name) { const text = name.slice(8); return text === "inf" ? Infinity : +text; }
function percentile(names, counts, share) {
  let rest = share * counts.reduce((a, b) => a + b, 0);
  if (!(rest > 0)) return NaN;
  for (let i = 0; i < counts.length; i++) {
    if (counts[i] && rest <= counts[i]) {
      const low = i ? bound(names[i - 1]) : 0, high = isFinite(bound(names[i])) ? bound(names[i]) : low;
      return low + (high - low) * rest / counts[i];
    }
    rest -= counts[i];
  }
  return NaN;
}
