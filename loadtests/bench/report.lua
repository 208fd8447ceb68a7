-- What wrk has measured, as one line of JSON: times in microseconds, errors by kind.
done = function(summary, latency, requests)
   local e = summary.errors
   io.write(string.format(
      'JSON {"requests": %d, "duration": %d, "p50": %d, "p99": %d, "p999": %d, "connect": %d, "read": %d, ' ..
      '"write": %d, "status": %d, "timeout": %d}\n',
      summary.requests, summary.duration, latency:percentile(50), latency:percentile(99),
      latency:percentile(99.9), e.connect, e.read, e.write, e.status, e.timeout))
end
