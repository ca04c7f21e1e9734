#!lua name=lmaas
-- The scheduler. Every function changes one pool atomically. There is no dispatcher process: each call that changes the state
-- (a gateway submits, releases or renews; a supervisor sends a heartbeat or has loaded an adapter; the reaper runs) also dispatches.
-- The parts of the library are joined in the order of PARTS in client.py. The last one has the functions.
--
-- A call costs O(log n) in the replicas, adapters, tenants and tickets of a pool. It reads facts by key and candidates from sorted sets;
-- none of what a call does grows with the fleet, and what may concern many tickets (their replica is lost, their gateways are gone) is
-- done in portions by the calls that follow.
--
-- KEYS[1] is `lmaas:{pool}`. The pool's other keys are that prefix with a suffix, so that a pool stays on one cluster slot:
--   :vars      hash  counters, sums, averages, epoch, began, layout, run, mark, base (see VARS)
--   :usage     stream of usage events
-- Tickets:
--   :tickets   hash  ticket id → JSON           :expiry    zset  ticket id → when its lease expires (ms)
--   :progress  hash  ticket id → tokens (see tokens_of)
--   :queue     zset  ticket id → sequence       :queue:T   zset  the tickets of tenant T that did not come back, in its order of service
--   :front     zset  ticket id → sequence, of tickets that came back: they have had their turn already
--   :sequences hash  tenant → its own sequence  :waiting   zset  tenant → counter, of tenants with a :queue:T
--   :counters  zset  tenant → counter, of all tenants
--   :needs     hash  queued ticket id → its needs (see needs_of)
--   :passed    hash  queued ticket id → how many tickets had been placed when it was first passed over
-- Background tickets wait in keys of the same form, whose names begin with `:background` (`:background:queue`, …). See yielding.lua.
-- Facts about replica R (see fleet.lua):
--   :replicas  hash  replica id → text          :held:R    zset  ticket id → sequence, of the tickets that hold slots there
--   :running:R hash  adapter → tickets that hold a slot with it    :used:R  hash  adapter → when a ticket was last placed with it
--   :resident:R set  adapters on its engine     :loading:R hash  adapter that it is to load → source
--   :waits:R|A zset  ticket id → sequence, of the tickets that hold a slot there until adapter A is loaded
--   :back:R    zset  ticket id → age, of the background tickets that hold slots there
-- Indices of replicas, which fleet.lua derives from these facts:
--   :free      zset  replica → share of its slots in use, of those that get work and have a free slot
--   :spare     zset  the same, of those that have a free adapter slot too
--   :crowded   zset  the same, of those that get work and have no free adapter slot
--   :runs:A    zset  replicas on which tickets hold a slot with adapter A    :has:A  zset  replicas on which adapter A is resident
--   :starting  zset  replica → since when       :due       zset  replica → when its silence matters next (ms), from which
--   its last heartbeat follows (see `beat_of`)
--   :yielding  zset  replica → age of its latest background ticket, of those that get work and on which background tickets hold slots
-- Tickets whose replica is lost or drains and that no call has reached yet:
--   :lost      list  numbers n                  :lost:n    zset  ticket id → sequence
-- What a tenant or a key has used of its limits is in `lmaas:limits:<id>` (see limits.lua), for all pools together. It is valid only for
-- the value that `lmaas:limits` had when it was written.
--
-- This memory may be lost, replaced by an older one (a snapshot, a replica that lagged), or written by another release. Then the pool is
-- rebuilt: it is emptied except for its usage events, and gets a new epoch. From the epoch the gateways see that they must report again
-- what waits, what runs and what ended lately.
--
-- A ticket is queued → (loading →) granted → gone; see TICKET. Time is the server's own (TIME), so other machines' clocks do not matter.
-- A pool's time never goes back: when the server's clock is set back, the pool adds the difference from then on. Only limits and months
-- follow the server's clock itself.

-- Grows with every change of the stored state that a library of another layout would misread. In all layouts, `:vars` is a hash with
-- `layout` and `reaped`, `:tickets` is a hash of JSON with `event`, and `:usage` is a stream of events.
local LAYOUT = 3
local LEASE_MS = 6000     -- a gateway renews its leases every second
local STALE_MS = 5000     -- a replica without a heartbeat for this long gets no new work
local GONE_MS = 30000     -- after this long it is removed
local AWAY_MS = 3000      -- without any call for this long, the server was away
local PRESENT_MS = 10000  -- the controller reads every pool every second
local MAX_ATTEMPTS = 2    -- the first delivery and one more
local TURN_MS = 2000      -- the assumed run time of a request, until one is known
local START_MS = 20000    -- the assumed time of an engine's start, until one is known
local MAX_YIELDS = 16     -- background tickets that one call puts back
local MAX_REAPED = 64     -- tickets of lost gateways and of lost replicas that one call ends or takes back; the next call continues

-- Words that clients read, or that are stored. lmaas/scheduling/states.py has the same words and their meanings; a test compares the two,
-- and finds a name that is misspelt here.
local TICKET = {
  QUEUED = 'queued', LOADING = 'loading', GRANTED = 'granted', REVOKED = 'revoked', FAILED = 'failed', LOAD_FAILED = 'load_failed',
  YIELDED = 'yielded',
}
local NO_TICKET = {
  REFUSED = 'refused', REFUSED_BY_POOL = 'refused_by_pool', LIMITED = 'limited', UNSEEDED = 'unseeded', UNKNOWN = 'unknown',
}
local PHASE = { BUSY = 'busy', STARTING = 'starting', ASKED = 'asked' }
local REASON = { ENGINE = 'engine', ADAPTER = 'adapter' }
local SIGNAL = { LOAD = 'load', DEMAND = 'demand' }
local LIMIT = {
  CONCURRENCY = 'concurrency', REQUESTS = 'requests', TOKENS = 'tokens', REQUEST_TOKENS = 'request_tokens', MONTH_TOKENS = 'month_tokens',
  BUDGET = 'budget',
}
-- Of lmaas/states.py: a replica's observed states that matter here, and the ends of a request and of durable work whose process is gone.
local REPLICA = { STARTING = 'starting', READY = 'ready', DRAINING = 'draining' }
local LOST = { STATUS = 'lost', CODE = 'gateway_lost' }
local WASTED = { STATUS = 'wasted', CODE = 'runner_lost' }

-- The id of the server process. A new process may have lost the memory of the one before it. It is read once per process.
local process = nil
-- Decodes token counts, which clients send and `:progress` stores as JSON `[prompt, cached, completion]`; returns nil for ''. The release
-- before this one, which may still run beside it, stores them without the brackets; it finds its three numbers in this form too, since
-- they come first.
local function tokens_of(text)
  if text == '' then return nil end
  local counts = cjson.decode(string.byte(text) == 91 and text or '[' .. text .. ']') -- 91 is '['
  return { prompt = counts[1], cached = counts[2], completion = counts[3] }
end

-- Returns the tokens of a ticket's last checkpoint; nil before the first.
local function progress(pool, ticket)
  return tokens_of(redis.call('HGET', pool.key .. ':progress', ticket.id) or '')
end

-- Records the usage event of a ticket whose gateway is gone. If the gateway reports its own event later, the ledger replaces this one.
local function record_lost(pool, ticket)
  local event = cjson.decode(ticket.event)
  local used = progress(pool, ticket) or { prompt = 0, cached = 0, completion = 0 }
  event.status, event.code = LOST.STATUS, LOST.CODE
  if ticket.durable then event.status, event.code = WASTED.STATUS, WASTED.CODE end
  event.prompt_tokens, event.cached_tokens, event.completion_tokens = used.prompt, used.cached, used.completion
  event.queue_ms = (ticket.placed or pool.now) - ticket.submitted
  event.load_ms = ticket.placed and (ticket.granted or pool.now) - ticket.placed or 0
  event.run_ms = ticket.granted and pool.now - ticket.granted or 0
  event.replica_id = ticket.replica or ticket.revoked or cjson.null
  redis.call('XADD', pool.key .. ':usage', '*', 'event', cjson.encode(event))
  return used
end

-- The last state of each pool that this process has seen: {mark, epoch, began, base}. While the mark continues from there, no other
-- library was used.
local seen_last = {}

-- The fields of `:vars` that nearly every call needs and reads when it begins. The others are read when they are needed:
--   reaped, offset, spare  the server's time at the last call; by how much this pool's is later; until when no one is given up
--   seq, placed, lives     numbers given to tickets, placements and replicas so far
--   lost                   the lists in `:lost`
--   last, floor            see fairness.lua
--   turn, active           when a slot was last taken, or a replica became ready; when there was last any demand
--   load, back, room       slots in use; those of background tickets; free slots of the replicas that get work
--   slots, able            the slots of ready replicas; the replicas that may get work sooner or later
--   open, open_slots, adapters  the replicas that get work, their slots, their free adapter slots
--   boost, boost_at, arrived  see reserve.lua
--   calm                   until when no replica has been silent for too long and no lease has expired; see `reap`
--   ages, yields           numbers given to background tickets that were placed; background tickets that were put back
-- `open` reads them in this order.
local VARS = { 'reaped', 'offset', 'spare', 'lost', 'load', 'back', 'room', 'seq', 'placed', 'last', 'floor', 'calm', 'run_ms' }

-- Returns a field of `:vars` as text, or false.
local function text_of(pool, name)
  local value = pool.vars[name]
  if value == nil then
    value = redis.call('HGET', pool.key .. ':vars', name)
    pool.vars[name] = value
  end
  return value
end

local function var(pool, name, default)
  return tonumber(text_of(pool, name) or default)
end

local function set_var(pool, name, value)
  pool.vars[name], pool.written[name] = value, value
end

-- Returns the next number of a counter in `:vars`.
local function next_of(pool, name)
  local value = var(pool, name, 0) + 1
  set_var(pool, name, value)
  return value
end

-- Moves a moving average by an eighth of the difference, so that it follows about the last dozen values.
local function average(pool, name, value, default)
  local old = var(pool, name, default)
  set_var(pool, name, math.floor(old + (value - old) / 8))
end

-- Begins a new epoch of an empty pool. `mark` grows with every call and across epochs: it begins with the time in µs. An epoch is named
-- after its first mark.
local function begin_epoch(pool, mark)
  pool.now = pool.wall
  pool.mark = math.max(pool.now * 1000, mark + 1)
  pool.epoch, pool.base, pool.began = string.format('%.0f', pool.mark), pool.mark, pool.run
  seen_last[pool.key] = { mark = pool.mark, epoch = pool.epoch, began = pool.run, base = pool.base }
  pool.replicas, pool.was, pool.dirty, pool.moved, pool.tickets, pool.changed = {}, {}, {}, {}, {}, {}
  pool.vars, pool.written = {}, {}
  set_var(pool, 'reaped', pool.wall)
  redis.call(
    'HSET', pool.key .. ':vars', 'layout', LAYOUT, 'epoch', pool.epoch, 'began', pool.run, 'run', pool.run, 'mark', pool.epoch, 'base', pool.epoch
  )
end

-- Makes all counts of tenants and keys invalid. Every pool that was rebuilt asks for this; only the first of this process has an effect.
-- The value contains the time, because the same release may come back to this process after another one has used it.
local function doubt_limits(pool)
  local mine = LAYOUT .. '-' .. pool.run .. '-'
  local said = redis.call('GET', 'lmaas:limits')
  if not said or string.sub(said, 1, #mine) ~= mine then redis.call('SET', 'lmaas:limits', mine .. string.format('%.0f', pool.wall)) end
end

-- Empties a pool whose memory cannot be trusted. The ledger takes each event once, so what is reported again is not charged twice.
local function rebuild(pool, mark)
  local stored = redis.pcall('HGETALL', pool.key .. ':tickets')
  for i = 2, stored.err and 0 or #stored, 2 do
    -- A ticket of another release may have any content.
    pcall(function() record_lost(pool, cjson.decode(stored[i])) end)
  end
  for _, key in ipairs(redis.call('KEYS', pool.key .. ':*')) do
    if string.sub(key, 1, #pool.key + 6) ~= pool.key .. ':usage' then redis.call('DEL', key) end
  end
  doubt_limits(pool)
  begin_epoch(pool, mark)
end

-- Returns whether processes of a newer release use this pool now. Those of this release are about to be replaced and must not change it.
local function is_of_newer(prefix, wall)
  local found = redis.call('HMGET', prefix .. ':vars', 'layout', 'reaped')
  return tonumber(found[1] or 0) > LAYOUT and math.abs(wall - tonumber(found[2] or 0)) < LEASE_MS
end

-- Reads a pool at the beginning of a call. For a pool that a newer release uses, it returns nil if `or_nil`, else it raises an error.
local function open(prefix, or_nil)
  process = process or string.match(redis.call('INFO', 'server'), 'run_id:(%w+)')
  local time = redis.call('TIME')
  local wall = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
  -- Tables get their usual fields when they are made, since to let them grow one by one costs more than all else here.
  local pool = {
    key = prefix, wall = wall, now = wall, run = process, budget = MAX_REAPED, yields = MAX_YIELDS, mark = 0, epoch = false, base = false,
    began = false, idle = nil, gone = nil, month = nil, replicas = {}, was = {}, dirty = {}, moved = {}, tickets = {}, changed = {}, vars = {},
    written = {
      mark = false, reaped = wall, load = false, room = false, seq = false, placed = false, last = false, turn = false, active = false,
      arrived = false, run_ms = false,
    },
    -- The two queues: the prefix of their keys, and their fields of `:vars`.
    interactive = { key = prefix, last = 'last', floor = 'floor', placed = 'placed' },
    background = {
      key = prefix .. ':background', last = 'background_last', floor = 'background_floor', placed = 'background_placed', is_background = true,
    },
  }
  local stored = redis.call('HMGET', prefix .. ':vars', 'mark', unpack(VARS))
  pool.mark = tonumber(stored[1] or 0) + 1
  local seen = seen_last[prefix]
  if not seen or seen.mark + 1 ~= pool.mark then
    local found = redis.call('HMGET', prefix .. ':vars', 'layout', 'epoch', 'run', 'base', 'began')
    if tonumber(found[1] or 0) ~= LAYOUT then
      if is_of_newer(prefix, wall) then
        if or_nil then return nil end
        error('this pool is used by a newer release')
      end
      if redis.call('EXISTS', prefix .. ':vars', prefix .. ':tickets', prefix .. ':replicas') == 0 then
        begin_epoch(pool, 0)
      else
        rebuild(pool, pool.mark)
      end
      return pool
    end
    seen = { epoch = found[2], base = tonumber(found[4]), began = found[5] }
    if found[3] ~= process then
      -- A new process has begun with this memory. A client that has seen more in the process before knows that the memory is older.
      seen.base = pool.mark - 1
      redis.call('HSET', prefix .. ':vars', 'run', process, 'base', string.format('%.0f', seen.base))
    end
    seen_last[prefix] = seen
    stored[13] = false -- `calm`: another library was used, which may have given other leases
  end
  seen.mark, pool.epoch, pool.base, pool.began = pool.mark, seen.epoch, seen.base, seen.began
  pool.vars = {
    reaped = stored[2], offset = stored[3], spare = stored[4], lost = stored[5], load = stored[6], back = stored[7], room = stored[8],
    seq = stored[9], placed = stored[10], last = stored[11], floor = stored[12], calm = stored[13], run_ms = stored[14], mark = pool.mark,
    turn = nil, active = nil, arrived = nil,
  }
  pool.written.mark = pool.mark
  local last = var(pool, 'reaped', wall)
  if wall < last then set_var(pool, 'offset', var(pool, 'offset', 0) + last - wall) end
  pool.now = wall + var(pool, 'offset', 0)
  -- There is a call every second. If there was none for a while, this server was away, not all its clients: they get time to come back.
  if wall - last > AWAY_MS then set_var(pool, 'spare', pool.now + LEASE_MS) end
  set_var(pool, 'reaped', wall)
  return pool
end

-- Returns the mark that a client keeps and sends with its next call to `open_as_seen`.
local function memory(pool)
  return string.format('%s %.0f', pool.run, pool.mark)
end

-- Reads a pool, and rebuilds it if its client has seen a later state of it. `seen` is what `memory` returned last, '' before the first
-- call.
local function open_as_seen(prefix, seen)
  local pool = open(prefix)
  local run, mark = string.match(seen, '^(%w+) (%d+)$')
  mark = tonumber(mark)
  if mark and mark > (run == pool.run and pool.mark or pool.base) then
    rebuild(pool, mark)
  elseif mark and run ~= pool.run and pool.began == pool.run and mark < tonumber(pool.epoch) then
    -- The memory was lost, and this process began a new one, so its counts of limits may be old. (An epoch that the process has only taken
    -- over is older than the loss.)
    doubt_limits(pool)
  end
  return pool
end

-- Decodes a ticket as it was sent or stored.
local function decoded(text)
  local ticket = cjson.decode(text)
  ticket.text = text
  return ticket
end

-- Returns whether neither interactive nor background tickets wait. It is asked once in a call; `enqueue` knows better.
local function nothing_waits(pool)
  if pool.idle == nil then pool.idle = redis.call('EXISTS', pool.interactive.key .. ':queue', pool.background.key .. ':queue') == 0 end
  return pool.idle
end

-- Encodes a ticket: as it was sent, with what changes of it behind that. To copy the text costs less than to encode all of it.
local function encoded(ticket)
  local text = ticket.text
  -- In a JSON string, the quotes of these names would be escaped.
  local rest = string.find(text, ',"waited_ms":', 1, true) or string.find(text, ',"attempts":', 1, true)
  return string.sub(text, 1, rest - 1) .. ',"attempts":' .. ticket.attempts .. ',' .. string.sub(cjson.encode({
    state = ticket.state, submitted = ticket.submitted, sequence = ticket.sequence, reserved = ticket.reserved, placed = ticket.placed,
    granted = ticket.granted, replica = ticket.replica, life = ticket.life, held = ticket.held, revoked = ticket.revoked,
  }), 2)
end

-- Arguments of HSET, kept between calls.
local fields = {}

-- Writes what a call has changed of tickets and `:vars`; `close` (fleet.lua) does it, after the replicas.
local function write_rest(pool)
  for id, ticket in pairs(pool.changed) do redis.call('HSET', pool.key .. ':tickets', id, encoded(ticket)) end
  pool.changed = {}
  local count = 0
  for name, value in pairs(pool.written) do
    if value then
      fields[count + 1], fields[count + 2] = name, value
      count = count + 2
    end
  end
  pool.written = {}
  if count > 0 then redis.call('HSET', pool.key .. ':vars', unpack(fields, 1, count)) end
end

-- Returns whether a ticket still holds what it was given: its replica was not removed since, and if it waits there for its adapter, the
-- replica does not drain. Defined in fleet.lua.
local stands
-- Takes a ticket that does not stand from its replica. Defined in endings.lua.
local displace

-- Returns a ticket, or nil. A ticket is read once in a call and written by `close`: it may change several times, and its JSON is what
-- costs most. A ticket whose replica was lost looks the same whether a call has reached it in `:lost` or not.
local function get(pool, id)
  local known = pool.tickets[id]
  if known == nil then
    local stored = redis.call('HGET', pool.key .. ':tickets', id)
    known = stored and decoded(stored) or false
    pool.tickets[id] = known
  end
  -- Also of a ticket that this call has read before it removed the replica.
  if known and known.replica and var(pool, 'lost', 0) > 0 and not stands(pool, known) then displace(pool, known) end
  return known or nil
end

local function put(pool, ticket)
  pool.tickets[ticket.id], pool.changed[ticket.id] = ticket, ticket
end

local function drop(pool, ticket)
  pool.changed[ticket.id] = nil
  pool.tickets[ticket.id] = false
  redis.call('HDEL', pool.key .. ':tickets', ticket.id)
end

-- Tells a ticket's gateway of its new state.
local function tell(ticket, event, fields)
  fields = fields or {}
  -- `attempts` distinguishes news of this delivery from late news of an earlier one.
  fields.id, fields.event, fields.attempts = ticket.id, event, ticket.attempts
  redis.call('PUBLISH', 'lmaas:gateway:' .. ticket.gateway, cjson.encode(fields))
end

-- Encodes and decodes the needs of a queued ticket, by which it finds a replica: sequences and adapter ('' for the base model). Tickets
-- with the same needs have the same text.
local function needs_of(ticket)
  return ticket.weight .. '|' .. ticket.adapter
end

local function weight_and_adapter(needs)
  local weight, adapter = string.match(needs, '^(%d+)|(.*)$')
  return tonumber(weight), adapter
end
