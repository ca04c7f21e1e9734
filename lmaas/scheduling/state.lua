#!lua name=lmaas
-- The scheduler. Every function changes one pool atomically; there is no dispatcher process. Whoever changes the state
-- (a gateway that submits, releases or renews; a supervisor that beats or has loaded an adapter; the reaper) also dispatches.
-- One library in five parts, joined in this order: state, limits, fairness, placement, scheduler (the functions).
--
-- KEYS[1] is `lmaas:{pool}`; the pool's other keys are that prefix with a suffix, so a pool stays on one cluster slot:
--   :tickets   hash  ticket id → JSON           :expiry    zset  ticket id → when its gateway is given up (ms)
--   :queue     zset  ticket id → sequence       :queue:T   zset  those of tenant T that did not come back, in its order of service
--   :front     zset  ticket id → sequence, of those that came back: they have had their turn already
--   :sequences hash  tenant → its own sequence  :waiting   zset  tenant → counter, of those with a :queue:T
--   :counters  zset  tenant → counter, of those that do not wait too
--   :needs     hash  queued ticket id → "weight|adapter"
--   :passed    hash  queued ticket id → how many tickets had been placed when it was passed over first
--   :replicas  hash  replica id → JSON          :progress  hash  ticket id → "prompt,cached,completion"
--   :usage     stream of usage events           :vars      hash  counters, averages, epoch
-- What a tenant or a key has used of its limits is in `lmaas:limits:<id>` (see limits.lua), for all pools together.
--
-- A ticket is queued → (loading →) granted → gone. Queued: it waits for a slot. Loading: it holds a slot on a replica that
-- still loads its adapter. Granted: its gateway holds a lease. Time is the server's own (TIME), so clocks of other machines do not
-- matter.

local LEASE_MS = 6000     -- a gateway renews every second
local STALE_MS = 5000     -- no heartbeat for this long: no new work
local GONE_MS = 30000     -- no heartbeat for this long: its work is taken away
local AWAY_MS = 3000      -- no call at all for this long: the server was away
local PRESENT_MS = 10000  -- the controller looks at every pool every second
local MAX_ATTEMPTS = 2    -- the first delivery and one more
local TURN_MS = 2000      -- first guess of a request's run time
local START_MS = 20000    -- first guess of an engine's start

local function open(prefix)
  local time = redis.call('TIME')
  local pool = { key = prefix, now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000), replicas = {}, dirty = {} }
  local stored = redis.call('HGETALL', prefix .. ':replicas')
  for i = 1, #stored, 2 do pool.replicas[stored[i]] = cjson.decode(stored[i + 1]) end
  return pool
end

local function close(pool)
  for id, ticket in pairs(pool.changed or {}) do redis.call('HSET', pool.key .. ':tickets', id, cjson.encode(ticket)) end
  pool.changed = nil
  for id in pairs(pool.dirty) do
    local replica = pool.replicas[id]
    if replica then
      redis.call('HSET', pool.key .. ':replicas', id, cjson.encode(replica))
    else
      redis.call('HDEL', pool.key .. ':replicas', id)
    end
  end
end

local function var(pool, name, default)
  return tonumber(redis.call('HGET', pool.key .. ':vars', name) or default)
end

-- Averages follow the last dozen or so values.
local function average(pool, name, value, default)
  local old = var(pool, name, default)
  redis.call('HSET', pool.key .. ':vars', name, math.floor(old + (value - old) / 8))
end

local function epoch(pool)
  local value = redis.call('HGET', pool.key .. ':vars', 'epoch')
  if not value then
    value = tostring(pool.now) .. '-' .. tostring(math.random(1000000000))
    redis.call('HSET', pool.key .. ':vars', 'epoch', value)
  end
  return value
end

-- Tickets are read once in a call and written by `close`: one changes more than once, and its JSON costs more than the rest.
local function get(pool, id)
  pool.tickets = pool.tickets or {}
  local known = pool.tickets[id]
  if known == nil then
    local stored = redis.call('HGET', pool.key .. ':tickets', id)
    known = stored and cjson.decode(stored) or false
    pool.tickets[id] = known
  end
  return known or nil
end

local function put(pool, ticket)
  pool.tickets, pool.changed = pool.tickets or {}, pool.changed or {}
  pool.tickets[ticket.id], pool.changed[ticket.id] = ticket, ticket
end

local function drop(pool, ticket)
  if pool.changed then pool.changed[ticket.id] = nil end
  pool.tickets[ticket.id] = false
  redis.call('HDEL', pool.key .. ':tickets', ticket.id)
end

local function tell(ticket, event, fields)
  fields = fields or {}
  -- `attempts` tells news of this delivery from late news of an earlier one.
  fields.id, fields.event, fields.attempts = ticket.id, event, ticket.attempts
  redis.call('PUBLISH', 'lmaas:gateway:' .. ticket.gateway, cjson.encode(fields))
end

-- The tokens of a ticket's last checkpoint: prompt, cached, completion; nil before the first.
local function progress(pool, ticket)
  local stored = redis.call('HGET', pool.key .. ':progress', ticket.id)
  if not stored then return nil end
  local prompt, cached, completion = string.match(stored, '(%d+),(%d+),(%d+)')
  return { prompt = tonumber(prompt), cached = tonumber(cached), completion = tonumber(completion) }
end

local function size(map)
  local count = 0
  for _ in pairs(map) do count = count + 1 end
  return count
end
