#!lua name=lmaas
-- The scheduler. Every function changes one pool atomically; there is no dispatcher process. Whoever changes the state
-- (a gateway that submits, releases or renews; a supervisor that beats or has loaded an adapter; the reaper) also dispatches.
--
-- KEYS[1] is `lmaas:{pool}`; every other key is that prefix with a suffix, so a pool stays on one cluster slot:
--   :tickets   hash  ticket id → JSON           :expiry    zset  ticket id → when its gateway is given up (ms)
--   :queue     zset  ticket id → sequence       :queue:T   zset  the same for tenant T alone
--   :waiting   zset  tenant → turn              :turns     hash  tenant → turn of its last grant
--   :replicas  hash  replica id → JSON          :progress  hash  ticket id → "prompt,cached,completion"
--   :usage     stream of usage events           :vars      hash  counters, averages, epoch
--
-- A ticket is queued → (loading →) granted → gone. Queued: it waits for a slot. Loading: it holds a slot on a replica that
-- still loads its adapter. Granted: its gateway holds a lease. Tenants take turns: of those that wait, the one whose last
-- grant is longest ago goes first; within a tenant, first come, first served. Time is the server's own (TIME), so clocks
-- of other machines do not matter.

local LEASE_MS = 6000     -- a gateway renews every second
local STALE_MS = 5000     -- no heartbeat for this long: no new work
local GONE_MS = 30000     -- no heartbeat for this long: its work is taken away
local AWAY_MS = 3000      -- no call at all for this long: the server was away
local PRESENT_MS = 10000  -- the controller looks at every pool every second
local MAX_ATTEMPTS = 2    -- the first delivery and one more
local MAX_PASSES = 64     -- how often a ticket that waits for an adapter slot may be passed over
local MAX_SCAN = 256      -- tenants looked at in one round
local MAX_TURNS = 10000
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

local function get(pool, id)
  local stored = redis.call('HGET', pool.key .. ':tickets', id)
  return stored and cjson.decode(stored) or nil
end

local function put(pool, ticket)
  redis.call('HSET', pool.key .. ':tickets', ticket.id, cjson.encode(ticket))
end

local function tell(ticket, event, fields)
  fields = fields or {}
  -- `attempts` tells news of this delivery from late news of an earlier one.
  fields.id, fields.event, fields.attempts = ticket.id, event, ticket.attempts
  redis.call('PUBLISH', 'lmaas:gateway:' .. ticket.gateway, cjson.encode(fields))
end

local function enqueue(pool, ticket, front)
  local seq = redis.call('HINCRBY', pool.key .. ':vars', 'seq', 1)
  if front then seq = -1 / seq end -- before every positive number; among themselves in the order in which they came back
  ticket.state, ticket.replica, ticket.placed, ticket.granted = 'queued', nil, nil, nil
  put(pool, ticket)
  redis.call('ZADD', pool.key .. ':queue', seq, ticket.id)
  redis.call('ZADD', pool.key .. ':queue:' .. ticket.tenant, seq, ticket.id)
  if front then
    -- It has had its turn already.
    redis.call('ZADD', pool.key .. ':waiting', 0, ticket.tenant)
  else
    local turn = redis.call('HGET', pool.key .. ':turns', ticket.tenant) or 0
    redis.call('ZADD', pool.key .. ':waiting', 'NX', turn, ticket.tenant)
  end
end

local function dequeue(pool, ticket)
  redis.call('ZREM', pool.key .. ':queue', ticket.id)
  redis.call('ZREM', pool.key .. ':queue:' .. ticket.tenant, ticket.id)
  if redis.call('EXISTS', pool.key .. ':queue:' .. ticket.tenant) == 0 then
    redis.call('ZREM', pool.key .. ':waiting', ticket.tenant)
  end
end

local function hold(pool, ticket, replica)
  replica.load = replica.load + ticket.weight
  if ticket.adapter ~= '' then
    replica.running[ticket.adapter] = (replica.running[ticket.adapter] or 0) + 1
    replica.used[ticket.adapter] = pool.now
  end
  ticket.replica = replica.id
  pool.dirty[replica.id] = true
end

local function let_go(pool, ticket)
  local replica = ticket.replica and pool.replicas[ticket.replica]
  if not replica then return end
  replica.load = math.max(0, replica.load - ticket.weight)
  local count = replica.running[ticket.adapter]
  if count then replica.running[ticket.adapter] = count > 1 and count - 1 or nil end
  local loading = replica.loading[ticket.adapter]
  if loading then loading.tickets[ticket.id] = nil end
  pool.dirty[replica.id] = true
end

local function grant(pool, ticket)
  ticket.state, ticket.granted = 'granted', pool.now
  put(pool, ticket)
  return {
    replica = ticket.replica, url = pool.replicas[ticket.replica].url,
    queue_ms = ticket.placed - ticket.submitted, load_ms = ticket.granted - ticket.placed,
  }
end

local function size(map)
  local count = 0
  for _ in pairs(map) do count = count + 1 end
  return count
end

-- The replica for a ticket: where its adapter runs already, then where it is resident, then a free adapter slot; among equals
-- the least loaded. The second answer says that a slot was free, but no adapter slot.
local function choose(pool, ticket)
  local best, best_rank, best_load, short = nil, nil, nil, false
  for _, replica in pairs(pool.replicas) do
    local fresh = replica.state == 'ready' and not replica.suspect and pool.now - replica.beat < STALE_MS
    local weight = math.min(ticket.weight, replica.slots)
    if fresh and replica.load + weight <= replica.slots then
      local rank = 0
      if ticket.adapter ~= '' and not replica.running[ticket.adapter] then
        if size(replica.running) >= replica.adapter_slots then
          rank, short = nil, true
        else
          rank = replica.resident[ticket.adapter] and 1 or 2
        end
      end
      local load = replica.load / replica.slots
      if rank and (not best or rank < best_rank or (rank == best_rank and load < best_load)) then
        best, best_rank, best_load = replica, rank, load
      end
    end
  end
  return best, short
end

local function place(pool, ticket, replica, caller)
  dequeue(pool, ticket)
  local turn = redis.call('HINCRBY', pool.key .. ':vars', 'turn', 1)
  -- Who has not been here for that long has no turn to remember.
  if turn % MAX_TURNS == 0 and redis.call('HLEN', pool.key .. ':turns') > MAX_TURNS then redis.call('DEL', pool.key .. ':turns') end
  redis.call('HSET', pool.key .. ':turns', ticket.tenant, turn)
  if redis.call('ZSCORE', pool.key .. ':waiting', ticket.tenant) then
    redis.call('ZADD', pool.key .. ':waiting', turn, ticket.tenant)
  end
  ticket.weight = math.min(ticket.weight, replica.slots)
  ticket.placed, ticket.passes = pool.now, 0
  hold(pool, ticket, replica)
  if ticket.adapter == '' or replica.resident[ticket.adapter] then
    local fields = grant(pool, ticket)
    if ticket.id ~= caller then tell(ticket, 'granted', fields) end
    return
  end
  ticket.state = 'loading'
  put(pool, ticket)
  local loading = replica.loading[ticket.adapter]
  if not loading then
    loading = { source = ticket.source, tickets = {} }
    replica.loading[ticket.adapter] = loading
    redis.call('PUBLISH', 'lmaas:replica:' .. replica.id, 'load')
  end
  loading.tickets[ticket.id] = 1
end

-- Give out every slot that can be given out. A ticket that fits nowhere now (its adapter has no slot, or it needs several
-- slots) is passed over for those that fit, but not for ever: then the others wait until it has its place.
local function dispatch(pool, caller)
  local placed = true
  while placed do
    placed = false
    local passed = {}
    for _, tenant in ipairs(redis.call('ZRANGE', pool.key .. ':waiting', 0, MAX_SCAN - 1)) do
      local head = redis.call('ZRANGE', pool.key .. ':queue:' .. tenant, 0, 0)[1]
      local ticket = head and get(pool, head)
      local replica, short = nil, false
      if ticket then replica, short = choose(pool, ticket) end
      if replica then
        for _, other in ipairs(passed) do
          other.passes = (other.passes or 0) + 1
          put(pool, other)
        end
        place(pool, ticket, replica, caller)
        placed = true
        break -- turns have changed
      end
      if ticket then
        if not short and ticket.weight == 1 then return end -- no slot anywhere, for anybody
        if (ticket.passes or 0) >= MAX_PASSES then return end
        passed[#passed + 1] = ticket
      end
    end
  end
end

local function forget(pool, ticket)
  if ticket.state == 'queued' then dequeue(pool, ticket) else let_go(pool, ticket) end
  redis.call('HDEL', pool.key .. ':tickets', ticket.id)
  redis.call('HDEL', pool.key .. ':progress', ticket.id)
  redis.call('ZREM', pool.key .. ':expiry', ticket.id)
  redis.call('HSET', pool.key .. ':vars', 'active', pool.now)
end

-- Back to the front of the queue; false if it has been delivered often enough.
local function requeue(pool, ticket, delivered)
  let_go(pool, ticket)
  if delivered then
    ticket.attempts = ticket.attempts + 1
    if ticket.attempts >= MAX_ATTEMPTS then
      ticket.state, ticket.replica = 'failed', nil
      put(pool, ticket)
      return false
    end
  end
  enqueue(pool, ticket, true)
  return true
end

-- Take a replica out: what was loading waits again, what ran is told (its stream breaks, or is cut by its gateway).
local function remove(pool, id)
  pool.replicas[id] = nil
  pool.dirty[id] = true
  local stored = redis.call('HGETALL', pool.key .. ':tickets')
  for i = 2, #stored, 2 do
    local ticket = cjson.decode(stored[i])
    if ticket.replica == id then
      if ticket.state == 'loading' then
        requeue(pool, ticket, false)
      else
        -- It holds nothing any more, should a replica of this id come back.
        ticket.state, ticket.replica, ticket.revoked = 'revoked', nil, id
        put(pool, ticket)
        tell(ticket, 'revoked')
      end
    end
  end
end

-- Tickets of gateways that are gone are charged at their last checkpoint; replicas that are gone give their work back.
local function reap(pool)
  -- Somebody calls every second. If nobody could for a while, this server was away, not everybody else: let them come back first.
  local last = var(pool, 'reaped', pool.now)
  redis.call('HSET', pool.key .. ':vars', 'reaped', pool.now)
  if pool.now - last > AWAY_MS then redis.call('HSET', pool.key .. ':vars', 'spare', pool.now + LEASE_MS) end
  if pool.now < var(pool, 'spare', 0) then return end
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', pool.key .. ':expiry', '-inf', pool.now, 'LIMIT', 0, 100)) do
    local ticket = get(pool, id)
    if ticket then
      local event = cjson.decode(ticket.event)
      local prompt, cached, completion = string.match(redis.call('HGET', pool.key .. ':progress', id) or '0,0,0', '(%d+),(%d+),(%d+)')
      event.status, event.code = 'lost', 'gateway_lost'
      event.prompt_tokens, event.cached_tokens, event.completion_tokens = tonumber(prompt), tonumber(cached), tonumber(completion)
      event.queue_ms = (ticket.placed or pool.now) - ticket.submitted
      event.load_ms = ticket.placed and (ticket.granted or pool.now) - ticket.placed or 0
      event.run_ms = ticket.granted and pool.now - ticket.granted or 0
      event.replica_id = ticket.replica or ticket.revoked or cjson.null
      redis.call('XADD', pool.key .. ':usage', '*', 'event', cjson.encode(event))
      forget(pool, ticket)
    else
      redis.call('ZREM', pool.key .. ':expiry', id)
    end
  end
  for id, replica in pairs(pool.replicas) do
    if pool.now - replica.beat > GONE_MS then remove(pool, id) end
  end
end

-- How long a ticket at this position may have to wait, in ms.
local function estimate(pool, position)
  local slots, start = 0, nil
  local usual = var(pool, 'start_ms', START_MS)
  for _, replica in pairs(pool.replicas) do
    if replica.state == 'ready' then slots = slots + replica.slots end
    if replica.state == 'starting' then start = math.max(1000, math.min(start or usual, usual - (pool.now - replica.since))) end
  end
  local wait = 0
  if slots == 0 then wait, slots = start or usual, 16 end
  return math.floor(wait + math.ceil(position / slots) * var(pool, 'run_ms', TURN_MS))
end

local function report(pool, ticket)
  if ticket.state == 'queued' then
    local position = (redis.call('ZRANK', pool.key .. ':queue', ticket.id) or 0) + 1
    return { state = 'queued', attempts = ticket.attempts, position = position, wait_ms = estimate(pool, position) }
  end
  if ticket.state == 'granted' then
    local replica = pool.replicas[ticket.replica]
    if not replica then return { state = 'revoked', attempts = ticket.attempts } end
    return {
      state = 'granted', attempts = ticket.attempts, replica = ticket.replica, url = replica.url,
      queue_ms = ticket.placed - ticket.submitted, load_ms = ticket.granted - ticket.placed,
    }
  end
  return { state = ticket.state, attempts = ticket.attempts }
end

-- Signal the controller if something waits and no replica is there or on its way. More demand than that it sees by itself.
local function ask_for_replica(pool)
  if redis.call('ZCARD', pool.key .. ':queue') == 0 then return end
  for _, replica in pairs(pool.replicas) do
    if replica.state ~= 'draining' and not replica.suspect then return end
  end
  redis.call('PUBLISH', 'lmaas:control', 'demand')
end

-- submit(ticket JSON, max queued) → report. The same ticket again is the same ticket.
redis.register_function('lmaas_submit', function(keys, args)
  local pool = open(keys[1])
  reap(pool)
  local ticket = cjson.decode(args[1])
  local known = get(pool, ticket.id)
  if not known then
    -- What has waited already was accepted before this server lost its memory.
    if ticket.waited_ms == 0 and redis.call('ZCARD', pool.key .. ':queue:' .. ticket.tenant) >= tonumber(args[2]) then
      close(pool)
      return cjson.encode({ state = 'refused' })
    end
    -- One that comes back after the server lost its memory has waited, and perhaps been delivered, before.
    ticket.passes, ticket.submitted = 0, pool.now - ticket.waited_ms
    enqueue(pool, ticket, false)
    redis.call('ZADD', pool.key .. ':expiry', pool.now + LEASE_MS, ticket.id)
    redis.call('HSET', pool.key .. ':vars', 'active', pool.now)
    dispatch(pool, ticket.id)
    known = get(pool, ticket.id)
    ask_for_replica(pool)
  end
  close(pool)
  local reply = report(pool, known)
  reply.epoch = epoch(pool)
  return cjson.encode(reply)
end)

-- release(ticket id, usage event JSON or '', run ms or '') → 1, or 0 if the ticket was gone. The event is recorded in any case.
redis.register_function('lmaas_release', function(keys, args)
  local pool = open(keys[1])
  if args[2] ~= '' then redis.call('XADD', pool.key .. ':usage', '*', 'event', args[2]) end
  local ticket = get(pool, args[1])
  if ticket then
    if args[3] ~= '' then average(pool, 'run_ms', tonumber(args[3]), TURN_MS) end
    forget(pool, ticket)
  end
  reap(pool)
  dispatch(pool)
  close(pool)
  return ticket and 1 or 0
end)

-- retry(ticket id, replica id, reason, attempt) → report. Twice the same is once: a client repeats a call whose reply it lost. The replica was lost before the first byte, or lacks the adapter.
redis.register_function('lmaas_retry', function(keys, args)
  local pool = open(keys[1])
  local ticket = get(pool, args[1])
  local reply = { state = 'unknown' }
  if ticket then
    local replica = pool.replicas[args[2]]
    if replica then
      -- Nobody else is sent there until its supervisor has looked.
      if args[3] == 'engine' then replica.suspect = true end
      if args[3] == 'adapter' then replica.resident[ticket.adapter] = nil end
      pool.dirty[args[2]] = true
      redis.call('PUBLISH', 'lmaas:replica:' .. args[2], args[3])
    end
    local held = ticket.state == 'granted' or ticket.state == 'revoked'
    if held and ticket.attempts == tonumber(args[4]) then requeue(pool, ticket, true) end
    dispatch(pool, ticket.id)
    ask_for_replica(pool)
    reply = report(pool, get(pool, ticket.id))
  end
  close(pool)
  return cjson.encode(reply)
end)

-- renew(ticket id, progress or '', …) → {epoch, tickets: [report, …]} in the order of the arguments.
redis.register_function('lmaas_renew', function(keys, args)
  local pool = open(keys[1])
  local reports = {}
  for i = 1, #args, 2 do
    local ticket = get(pool, args[i])
    if ticket then
      redis.call('ZADD', pool.key .. ':expiry', pool.now + LEASE_MS, ticket.id)
      if args[i + 1] ~= '' then redis.call('HSET', pool.key .. ':progress', ticket.id, args[i + 1]) end
    end
  end
  reap(pool)
  dispatch(pool)
  for i = 1, #args, 2 do
    local ticket = get(pool, args[i])
    reports[#reports + 1] = ticket and report(pool, ticket) or { state = 'unknown' }
  end
  if #args > 0 then redis.call('HSET', pool.key .. ':vars', 'active', pool.now) end
  close(pool)
  return cjson.encode({ epoch = epoch(pool), tickets = reports })
end)

-- restore(ticket JSON) → 1, or 0 if its replica is not (yet) back. After Redis has lost its memory, a gateway puts back what runs.
redis.register_function('lmaas_restore', function(keys, args)
  local pool = open(keys[1])
  local ticket = cjson.decode(args[1])
  local replica = pool.replicas[ticket.replica]
  local done = 0
  if get(pool, ticket.id) then
    done = 1
  elseif replica then
    ticket.state, ticket.submitted = 'granted', pool.now - ticket.waited_ms
    ticket.placed, ticket.granted = pool.now, pool.now
    ticket.weight = math.min(ticket.weight, replica.slots)
    hold(pool, ticket, replica)
    put(pool, ticket)
    redis.call('ZADD', pool.key .. ':expiry', pool.now + LEASE_MS, ticket.id)
    done = 1
  end
  close(pool)
  return done
end)

-- heartbeat(replica id, JSON {url, slots, adapter_slots, state, resident[], cleared}) →
-- {state, load, suspect, epoch, loads: {adapter → source}, running: {adapter → count}, used: {adapter → ms ago}}
redis.register_function('lmaas_heartbeat', function(keys, args)
  local pool = open(keys[1])
  local beat = cjson.decode(args[2])
  local replica = pool.replicas[args[1]]
  if not replica then
    replica = { id = args[1], load = 0, running = {}, resident = {}, loading = {}, used = {}, since = pool.now, state = 'starting' }
    for _, adapter in ipairs(beat.resident) do replica.resident[adapter] = 1 end
    pool.replicas[args[1]] = replica
  end
  if beat.state == 'ready' and replica.state == 'starting' and beat.start_ms then average(pool, 'start_ms', beat.start_ms, START_MS) end
  -- Draining is decided here and does not come undone by a heartbeat that was already on its way.
  if replica.state ~= 'draining' then replica.state = beat.state end
  replica.url, replica.slots, replica.adapter_slots, replica.beat = beat.url, beat.slots, beat.adapter_slots, pool.now
  if beat.cleared then replica.suspect = nil end
  pool.dirty[replica.id] = true
  reap(pool)
  dispatch(pool)
  close(pool)
  local loads = {}
  for adapter, loading in pairs(replica.loading) do loads[adapter] = loading.source end
  local used = {}
  for adapter, time in pairs(replica.used) do used[adapter] = pool.now - time end
  return cjson.encode({
    state = replica.state, load = replica.load, suspect = replica.suspect or false, epoch = epoch(pool),
    loads = loads, running = replica.running, used = used,
    controller = pool.now - var(pool, 'controller', 0) < PRESENT_MS,
  })
end)

-- loaded(replica id, adapter) → how many tickets were granted.
redis.register_function('lmaas_loaded', function(keys, args)
  local pool = open(keys[1])
  local replica = pool.replicas[args[1]]
  local count = 0
  if replica then
    replica.resident[args[2]] = 1
    local loading = replica.loading[args[2]]
    replica.loading[args[2]] = nil
    pool.dirty[replica.id] = true
    for id in pairs(loading and loading.tickets or {}) do
      local ticket = get(pool, id)
      if ticket and ticket.state == 'loading' then
        tell(ticket, 'granted', grant(pool, ticket))
        count = count + 1
      end
    end
  end
  close(pool)
  return count
end)

-- load_failed(replica id, adapter, reason) → how many tickets failed: this adapter's own, nobody else's.
redis.register_function('lmaas_load_failed', function(keys, args)
  local pool = open(keys[1])
  local replica = pool.replicas[args[1]]
  local count = 0
  if replica then
    local loading = replica.loading[args[2]]
    replica.loading[args[2]] = nil
    pool.dirty[replica.id] = true
    for id in pairs(loading and loading.tickets or {}) do
      local ticket = get(pool, id)
      if ticket and ticket.state == 'loading' then
        let_go(pool, ticket)
        ticket.state, ticket.replica = 'load_failed', nil
        put(pool, ticket)
        tell(ticket, 'load_failed', { reason = args[3] })
        count = count + 1
      end
    end
    dispatch(pool)
  end
  close(pool)
  return count
end)

-- evict(replica id, adapter) → 1 if the adapter may be unloaded: nothing runs with it and nothing will be granted with it.
redis.register_function('lmaas_evict', function(keys, args)
  local pool = open(keys[1])
  local replica = pool.replicas[args[1]]
  local free = replica and not replica.running[args[2]]
  if free then
    replica.resident[args[2]], replica.used[args[2]] = nil, nil
    pool.dirty[replica.id] = true
  end
  close(pool)
  return free and 1 or 0
end)

-- drain(replica id) → the slots still in use, or -1 if the replica is not known (any more). No new work; what was loading goes back
-- to the queue.
redis.register_function('lmaas_drain', function(keys, args)
  local pool = open(keys[1])
  local replica = pool.replicas[args[1]]
  if replica then
    replica.state = 'draining'
    pool.dirty[replica.id] = true
    for _, loading in pairs(replica.loading) do
      for id in pairs(loading.tickets) do
        local ticket = get(pool, id)
        if ticket and ticket.state == 'loading' then requeue(pool, ticket, false) end
      end
    end
    replica.loading = {}
    dispatch(pool)
  end
  close(pool)
  return replica and replica.load or -1
end)

-- deregister(replica id): the engine is gone.
redis.register_function('lmaas_deregister', function(keys, args)
  local pool = open(keys[1])
  remove(pool, args[1])
  dispatch(pool)
  close(pool)
  ask_for_replica(pool)
  return 1
end)

-- stats() is the controller's, and says that there is one. → {queued, load, idle_ms, replicas: {id → {state, load, slots, beat_ms, resident, running}}}
redis.register_function('lmaas_stats', function(keys, args)
  local pool = open(keys[1])
  reap(pool)
  dispatch(pool)
  close(pool)
  -- A server that has lost its memory does not know how long nothing happened: idleness starts now.
  redis.call('HSETNX', pool.key .. ':vars', 'active', pool.now)
  redis.call('HSET', pool.key .. ':vars', 'controller', pool.now)
  local load, seen = 0, {}
  for id, replica in pairs(pool.replicas) do
    load = load + replica.load
    seen[id] = {
      state = replica.state, load = replica.load, slots = replica.slots, beat_ms = pool.now - replica.beat,
      resident = size(replica.resident), running = size(replica.running),
    }
  end
  return cjson.encode({
    queued = redis.call('ZCARD', pool.key .. ':queue'), load = load, replicas = seen,
    idle_ms = pool.now - var(pool, 'active', 0),
  })
end)
