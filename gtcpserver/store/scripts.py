"""The scripts that Redis runs. Each is one step for all machines, and Redis undoes none: checks come before changes.

Keys, each with the prefix of the settings before it:

    members     sorted set: each member, and when its lease is over; milliseconds of Redis's clock
    open:NAME   hash: by member, how many connections of a client (or user) it has open
    rate:NAME   when the token bucket of a client will be full again; milliseconds
    wrong:NAME  hash: by user, wrong passwords of an address
    places      hash: by part of a member, how many places of the service it has
    flow:NAME   hash: by part of a member, how many bytes per second of a user it could move

A part is one of the counters of a member that take a share of something: the member's name, "/" and a number.

Times are Redis's own: clocks of machines differ. A new master may have another clock, so a time that is further away
than can be is taken for the furthest.
"""

from __future__ import annotations

#: Milliseconds without a renewal until the counts of a member are void. A pause of its process (a blocked event loop)
#: may be that long; then it tells all of its counts again.
LEASE_MS = 5000

#: Seconds between two renewals.
RENEW_SECONDS = 1.0

#: Milliseconds until counts of what is open are deleted, unless they are used or renewed: only those of members that
#: died, and whose clients never came back, get that old.
OPEN_MS = 3_600_000

_NOW = """
local time = redis.call('TIME')
local now = time[1] * 1000 + time[2] / 1000
local function lives(member)
  local until_ = tonumber(redis.call('ZSCORE', KEYS[1], member) or 0)
  return until_ >= now and until_ <= now + 2 * LEASE
end
local function others(key, own)
  local found, counts = {}, redis.call('HGETALL', key)
  for f = 1, #counts, 2 do
    if counts[f] ~= own then
      if lives(string.match(counts[f], '^[^/]*')) then found[#found + 1] = tonumber(counts[f + 1])
      else redis.call('HDEL', key, counts[f]) end
    end
  end
  return found
end
"""

# Become a member, or announce counts. KEYS: members, then one for each count. ARGV: the member, then the counts.
ANNOUNCE = (
    _NOW
    + """
redis.call('ZADD', KEYS[1], string.format('%.0f', now + LEASE), ARGV[1])
redis.call('PEXPIRE', KEYS[1], OPEN)
for i = 2, #KEYS do
  if tonumber(ARGV[i]) > 0 then
    redis.call('HSET', KEYS[i], ARGV[1], ARGV[i])
    redis.call('PEXPIRE', KEYS[i], OPEN)
  else
    redis.call('HDEL', KEYS[i], ARGV[1])
  end
end
return 1
"""
)

# Renew a lease. KEYS: members, then counts to keep. ARGV: the member. Returns 0 if the lease was over.
RENEW = (
    _NOW
    + """
if not lives(ARGV[1]) then return 0 end
redis.call('ZADD', KEYS[1], string.format('%.0f', now + LEASE), ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', string.format('(%.0f', now))
redis.call('PEXPIRE', KEYS[1], OPEN)
for i = 2, #KEYS do redis.call('PEXPIRE', KEYS[i], OPEN) end
return 1
"""
)

# Count a connection, if all of its limits allow it. KEYS: members, then one for each limit. ARGV: the member, then for
# each limit three numbers: most open (0: it limits a rate), and of a rate the milliseconds of one token, and those by
# which the bucket may be ahead. Returns the number of the limit that refuses it, 0: none, -1: the lease is over; and
# the milliseconds until it would not.
ENTER = (
    _NOW
    + """
if not lives(ARGV[1]) then return {-1, 0} end
local full = {}
for i = 2, #KEYS do
  local at = 3 * i - 4
  local most = tonumber(ARGV[at])
  if most > 0 then
    local open = 0
    local counts = redis.call('HGETALL', KEYS[i])
    for f = 1, #counts, 2 do
      if counts[f] == ARGV[1] or lives(counts[f]) then open = open + counts[f + 1]
      else redis.call('HDEL', KEYS[i], counts[f]) end
    end
    if open >= most then return {i - 1, 0} end
  else
    local token, ahead = tonumber(ARGV[at + 1]), tonumber(ARGV[at + 2])
    local full_at = tonumber(redis.call('GET', KEYS[i]) or 0)
    full_at = math.min(math.max(full_at, now), now + ahead + token)
    if full_at > now + ahead then return {i - 1, math.ceil(full_at - now - ahead)} end
    full[i] = full_at + token
  end
end
for i = 2, #KEYS do
  if full[i] then
    redis.call('SET', KEYS[i], string.format('%.3f', full[i]), 'PX', math.ceil(full[i] - now) + 1)
  else
    redis.call('HINCRBY', KEYS[i], ARGV[1], 1)
    redis.call('PEXPIRE', KEYS[i], OPEN)
  end
end
return {0, 0}
"""
)

# Change counts without asking. KEYS: members, then one for each count. ARGV: the member, then what is added to each.
CHANGE = (
    _NOW
    + """
if not lives(ARGV[1]) then return 0 end
for i = 2, #KEYS do
  if redis.call('HINCRBY', KEYS[i], ARGV[1], ARGV[i]) <= 0 then redis.call('HDEL', KEYS[i], ARGV[1])
  else redis.call('PEXPIRE', KEYS[i], OPEN) end
end
return 1
"""
)

# Take places of the service, or give some back. KEYS: members, places. ARGV: the member, its part, the most that all
# have together; how many are used, how many it keeps in any case, and how many it wants beyond those used. Returns how
# many it has then: those used, and a stock, which is smaller the fewer are left; -1: the lease is over.
PLACES = (
    _NOW
    + """
if not lives(ARGV[1]) then return -1 end
local used, keep, wanted = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local free = tonumber(ARGV[3]) - used
for _, count in ipairs(others(KEYS[2], ARGV[2])) do free = free - count end
local stock = math.floor(free / (2 * math.max(redis.call('ZCARD', KEYS[1]), 1)))
local has = math.max(keep, used + math.max(0, stock, math.min(wanted, free)))
if has > 0 then
  redis.call('HSET', KEYS[2], ARGV[2], has)
  redis.call('PEXPIRE', KEYS[2], OPEN)
else
  redis.call('HDEL', KEYS[2], ARGV[2])
end
return has
"""
)

# Share rates of users. KEYS: members, then one flow for each user. ARGV: the member, its part, the rate, then for each
# user the bytes per second that this part could move; 0: it moves none any more. Returns for each user the share: what
# it could move, as far as all of them together do not exceed the rate, otherwise an even part of what the modest ones
# leave; and an even part of the rest. 0: the lease is over.
SHARES = (
    _NOW
    + """
if not lives(ARGV[1]) then return 0 end
local shares = {}
for i = 2, #KEYS do
  local want, left = tonumber(ARGV[i + 2]), tonumber(ARGV[3])
  local wants = others(KEYS[i], ARGV[2])
  if want > 0 then
    redis.call('HSET', KEYS[i], ARGV[2], ARGV[i + 2])
    redis.call('PEXPIRE', KEYS[i], LEASE)
  else
    redis.call('HDEL', KEYS[i], ARGV[2])
  end
  wants[#wants + 1] = want
  table.sort(wants)
  local share = 0
  for n, one in ipairs(wants) do
    local part = math.min(one, left / (#wants - n + 1))
    left = left - part
    if one <= want then share = part end
  end
  shares[i - 1] = string.format('%.3f', share + left / #wants)
end
return shares
"""
)

# Give a token back. KEYS: the rate. ARGV: milliseconds of one token.
GIVE_BACK = """
local full_at = redis.call('GET', KEYS[1])
if full_at then redis.call('SET', KEYS[1], string.format('%.3f', full_at - ARGV[1]), 'KEEPTTL') end
return 1
"""

# Wrong passwords. KEYS: those of an address. ARGV: a user ('' for none), what is added ('0': nothing, '-': forget the
# user's), milliseconds until they are forgotten. Returns how many there are, and the milliseconds until they are
# forgotten.
WRONG = """
if ARGV[2] == '-' then redis.call('HDEL', KEYS[1], ARGV[1])
elseif ARGV[2] ~= '0' then
  redis.call('HINCRBY', KEYS[1], ARGV[1], ARGV[2])
  redis.call('PEXPIRE', KEYS[1], ARGV[3])
end
local wrong = 0
for _, count in ipairs(redis.call('HVALS', KEYS[1])) do wrong = wrong + count end
return {wrong, redis.call('PTTL', KEYS[1])}
"""

# End a membership, whose counts are then void. KEYS: members. ARGV: the member.
LEAVE = "return redis.call('ZREM', KEYS[1], ARGV[1])"


def source_of(script: str) -> bytes:
    """Return a script as it is sent."""
    return f"local LEASE, OPEN = {LEASE_MS}, {OPEN_MS}\n{script}".encode()
