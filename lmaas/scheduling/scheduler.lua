-- The functions. See state.lua for the keys that they use.

-- Registers a function that is accepted by a server that has no memory left, because it frees memory or leads to that.
local function register_always(name, callback)
  redis.register_function({ function_name = name, callback = callback, flags = { 'allow-oom' } })
end

-- Returns how many ms are left of something that usually takes `usual` ms and has taken `elapsed`, and by how many ms it is late. If it
-- is late, the estimate is as long again as it is late, so that estimates never stand still.
local function left_of(usual, elapsed)
  return math.max(math.min(1000, usual), usual - elapsed, elapsed - usual), math.max(0, elapsed - usual)
end

-- Returns how long a ticket at this position may have to wait: {wait_ms, late_ms, phase, assumed}. `late_ms` is by how much the next
-- turn, or the start, is later than usual; of a start, both are its supervisor's own report if there is one. If `assumed`, no start of
-- this pool is known, and what the controller expects of a first start is used instead.
local function estimate(pool, position)
  local run, slots, turn = var(pool, 'run_ms', TURN_MS), 0, 0
  for _, replica in pairs(pool.replicas) do
    if replica.state == REPLICA.READY then
      slots, turn = slots + replica.slots, math.max(turn, replica.turn or replica.since)
    end
  end
  local left, late, phase, known = nil, nil, PHASE.BUSY, nil
  if slots > 0 then
    left, late = left_of(run, pool.now - turn)
  else
    slots, known = 16, var(pool, 'start_ms', nil)
    local usual = known or var(pool, 'first_ms', START_MS)
    for _, replica in pairs(pool.replicas) do
      if replica.state == REPLICA.STARTING then
        local mine, mine_late = left_of(usual, pool.now - replica.since)
        if replica.left then
          mine, mine_late = math.max(math.min(1000, replica.left), replica.left - (pool.now - replica.beat)), replica.late or 0
        end
        if not left or mine < left or (mine == left and mine_late < late) then left, late, phase = mine, mine_late, PHASE.STARTING end
      end
    end
    if not left then
      -- No supervisor reports yet. An engine was asked for when the first ticket came.
      local first = redis.call('ZRANGE', pool.key .. ':queue', 0, 0)[1]
      left, late = left_of(usual, first and pool.now - get(pool, first).submitted or 0)
      local delay = var(pool, 'delay_ms', 0) - (pool.now - var(pool, 'controller', 0))
      if delay > 0 then left, late = delay + usual, 0 end
      phase = PHASE.ASKED
    end
  end
  return {
    wait_ms = math.floor(left + (math.ceil(position / slots) - 1) * run), late_ms = late, phase = phase,
    assumed = phase ~= PHASE.BUSY and not known,
  }
end

-- Returns, by a tenant's index in the order of service, how many of the other tenants' tickets go before its ticket with `rank` own
-- tickets before it. Turns are assumed to cost the same. Tenants beyond MAX_LINE count with one ticket each.
local function turns_of(line, rank)
  local turns, before, after = {}, 0, 0
  for i = 1, #line.lengths do
    turns[i], before = before, before + math.min(line.lengths[i], rank + 1)
  end
  for i = #line.lengths, 1, -1 do
    turns[i], after = turns[i] + after + line.more, after + math.min(line.lengths[i], rank)
  end
  turns.beyond = before + line.more - 1
  return turns
end

-- Returns a queued ticket's position in the order of service, from 1. It is behind the tickets that came back. The lengths of the queues
-- are read once a call, so the call must not change the queue any more.
local function position_of(pool, ticket)
  local front = redis.call('ZRANK', pool.key .. ':front', ticket.id)
  if front then return front + 1 end
  front = redis.call('ZCARD', pool.key .. ':front')
  local rank = redis.call('ZRANK', pool.key .. ':queue:' .. ticket.tenant, ticket.id)
  if rank == 0 then return front + redis.call('ZRANK', pool.key .. ':waiting', ticket.tenant) + 1 end
  local line = pool.line
  if not line then
    line = { index = {}, lengths = {}, turns = {}, more = math.max(0, redis.call('ZCARD', pool.key .. ':waiting') - MAX_LINE) }
    for i, tenant in ipairs(redis.call('ZRANGE', pool.key .. ':waiting', 0, MAX_LINE - 1)) do
      line.index[tenant], line.lengths[i] = i, redis.call('ZCARD', pool.key .. ':queue:' .. tenant)
    end
    pool.line = line
  end
  local turns = line.turns[rank]
  if not turns then
    turns = turns_of(line, rank)
    line.turns[rank] = turns
  end
  return front + rank + turns[line.index[ticket.tenant] or 'beyond'] + 1
end

-- Returns what a gateway is told of its ticket.
local function report(pool, ticket)
  if ticket.state == TICKET.QUEUED then
    local position = position_of(pool, ticket)
    local reply = estimate(pool, position)
    reply.state, reply.attempts, reply.position = TICKET.QUEUED, ticket.attempts, position
    return reply
  end
  if ticket.state == TICKET.GRANTED then
    local replica = pool.replicas[ticket.replica]
    if not replica then return { state = TICKET.REVOKED, attempts = ticket.attempts } end
    return {
      state = TICKET.GRANTED, attempts = ticket.attempts, replica = ticket.replica, url = replica.url,
      queue_ms = ticket.placed - ticket.submitted, load_ms = ticket.granted - ticket.placed,
    }
  end
  return { state = ticket.state, attempts = ticket.attempts }
end

-- Wakes the controller if a ticket waits and no replica is ready or starting. It notices other changes of demand by itself.
local function ask_for_replica(pool)
  if redis.call('ZCARD', pool.key .. ':queue') == 0 then return end
  for _, replica in pairs(pool.replicas) do
    if replica.state ~= REPLICA.DRAINING and not replica.suspect then return end
  end
  redis.call('PUBLISH', 'lmaas:control', SIGNAL.DEMAND)
end

-- Returns the refusal if the tenant's queue or the pool's is full, else nil.
local function full(pool, ticket, max_queued, max_queued_pool)
  if redis.call('ZCARD', pool.key .. ':queue:' .. ticket.tenant) >= max_queued then return { state = NO_TICKET.REFUSED } end
  local queued = redis.call('ZCARD', pool.key .. ':queue')
  if queued >= max_queued_pool then return { state = NO_TICKET.REFUSED_BY_POOL, wait_ms = estimate(pool, queued).wait_ms } end
  return nil
end

-- submit(ticket JSON, max queued of the tenant, of the pool, seeds JSON {scope → [month, tokens, cost]} or '') → report, with what is
-- left of the limits. Submitting a ticket again changes nothing.
redis.register_function('lmaas_submit', function(keys, args)
  local pool = open(keys[1])
  if reap(pool) then dispatch(pool) end
  local ticket = cjson.decode(args[1])
  local known, left = get(pool, ticket.id), nil
  if not known then
    -- A ticket that has waited already was accepted before this server lost its memory.
    local accepted = ticket.waited_ms > 0
    if args[4] ~= '' then take_seeds(pool, cjson.decode(args[4])) end
    local refused = not accepted and full(pool, ticket, tonumber(args[2]), tonumber(args[3])) or nil
    if not refused then refused, left = reserve(pool, ticket, accepted) end
    if refused then
      close(pool)
      return cjson.encode(refused)
    end
    -- A ticket that is submitted again after the server lost its memory has waited, and perhaps been delivered, before.
    ticket.submitted = pool.now - ticket.waited_ms
    redis.call('ZADD', pool.key .. ':expiry', pool.now + LEASE_MS, ticket.id)
    redis.call('HSET', pool.key .. ':vars', 'active', pool.now)
    if not place_at_once(pool, ticket) then
      enqueue(pool, ticket, false)
      dispatch(pool, ticket.id)
      ask_for_replica(pool)
    end
    known = ticket
  end
  close(pool)
  local reply = report(pool, known)
  reply.epoch, reply.memory, reply.left = pool.epoch, memory(pool), left
  return cjson.encode(reply)
end)

-- release(ticket id, usage event JSON or '', run ms or '', tokens or '') → {1, or 0 if the ticket was gone, memory}.
-- The event is recorded in either case.
register_always('lmaas_release', function(keys, args)
  if args[2] ~= '' then redis.call('XADD', keys[1] .. ':usage', '*', 'event', args[2]) end
  local pool = open(keys[1], true)
  -- A newer release uses the pool now and does not know the ticket. A gateway that stops must be able to settle all the same.
  if not pool then return { 0, '' } end
  local ticket = get(pool, args[1])
  if ticket then
    if args[3] ~= '' then average(pool, 'run_ms', tonumber(args[3]), TURN_MS) end
    forget(pool, ticket, tokens_of(args[4]))
  end
  reap(pool)
  dispatch(pool)
  close(pool)
  return { ticket and 1 or 0, memory(pool) }
end)

-- retry(ticket id, replica id, reason, attempt) → report. The replica failed before the first byte, or lacks the adapter. The same call
-- again changes nothing, because a client repeats a call whose reply it lost.
redis.register_function('lmaas_retry', function(keys, args)
  local pool = open(keys[1])
  local ticket = get(pool, args[1])
  local reply = { state = NO_TICKET.UNKNOWN }
  if ticket then
    local held = ticket.state == TICKET.GRANTED or ticket.state == TICKET.REVOKED
    if held and ticket.attempts == tonumber(args[4]) then
      local replica = pool.replicas[args[2]]
      if replica then
        -- It gets no new work until its supervisor has probed the engine.
        if args[3] == REASON.ENGINE then replica.suspect = true end
        if args[3] == REASON.ADAPTER then replica.resident[ticket.adapter] = nil end
        pool.dirty[args[2]] = true
        redis.call('PUBLISH', 'lmaas:replica:' .. args[2], args[3])
      end
      requeue(pool, ticket, true)
    end
    dispatch(pool, ticket.id)
    ask_for_replica(pool)
    reply = report(pool, get(pool, ticket.id))
  end
  close(pool)
  return cjson.encode(reply)
end)

-- renew(memory, ticket id, tokens or '', …) → {epoch, memory, tickets: [report, …]} in the order of the arguments.
register_always('lmaas_renew', function(keys, args)
  local pool = open_as_seen(keys[1], args[1])
  local reports = {}
  for i = 2, #args, 2 do
    local ticket = get(pool, args[i])
    if ticket then
      redis.call('ZADD', pool.key .. ':expiry', pool.now + LEASE_MS, ticket.id)
      -- A checkpoint of an earlier delivery may come late: a ticket that waits or loads has not run.
      local may_run = ticket.state == TICKET.GRANTED or ticket.state == TICKET.REVOKED or ticket.state == TICKET.YIELDED
      if args[i + 1] ~= '' and may_run then
        local before = charged(pool, ticket)
        redis.call('HSET', pool.key .. ':progress', ticket.id, args[i + 1])
        charge(pool, ticket, charged(pool, ticket) - before)
      end
    end
  end
  reap(pool)
  dispatch(pool)
  for i = 2, #args, 2 do
    local ticket = get(pool, args[i])
    reports[#reports + 1] = ticket and report(pool, ticket) or { state = NO_TICKET.UNKNOWN }
  end
  if #args > 1 then redis.call('HSET', pool.key .. ':vars', 'active', pool.now) end
  close(pool)
  return cjson.encode({ epoch = pool.epoch, memory = memory(pool), tickets = reports })
end)

-- restore(ticket JSON) → 1, or 0 while its replica is not back. After the server has lost its memory, a gateway puts back what runs.
redis.register_function('lmaas_restore', function(keys, args)
  local pool = open(keys[1])
  local ticket = cjson.decode(args[1])
  local replica = pool.replicas[ticket.replica]
  local done = 0
  if get(pool, ticket.id) then
    done = 1
  elseif replica then
    ticket.state, ticket.submitted = TICKET.GRANTED, pool.now - ticket.waited_ms
    ticket.placed, ticket.granted = pool.now, pool.now
    reserve(pool, ticket, true)
    charge(pool, ticket, PROMPT_COST * ticket.prompt_tokens)
    hold(pool, ticket, replica)
    put(pool, ticket)
    redis.call('ZADD', pool.key .. ':expiry', pool.now + LEASE_MS, ticket.id)
    -- A waiting ticket may share its adapter slot.
    dispatch(pool)
    done = 1
  end
  close(pool)
  return done
end)

-- heartbeat(replica id, JSON {url, slots, adapter_slots, state, resident[], cleared, suspect, start_ms, left_ms, late_ms}, memory) →
-- {state, load, suspect, epoch, memory, loads: {adapter → source}, warm: {adapter → source}, running: {adapter → count},
-- used: {adapter → ms ago}}. `warm` are the adapters that the queue needs first, for an engine that starts.
redis.register_function('lmaas_heartbeat', function(keys, args)
  local pool = open_as_seen(keys[1], args[3])
  local beat = cjson.decode(args[2])
  local replica = pool.replicas[args[1]]
  if not replica then
    replica = { id = args[1], load = 0, running = {}, resident = {}, loading = {}, used = {}, since = pool.now, state = REPLICA.STARTING }
    for _, adapter in ipairs(beat.resident) do replica.resident[adapter] = 1 end
    pool.replicas[args[1]] = replica
  end
  -- The usual time of the pool's starts, from the records that supervisors keep.
  if beat.start_ms and beat.start_ms ~= var(pool, 'start_ms', nil) then redis.call('HSET', pool.key .. ':vars', 'start_ms', beat.start_ms) end
  if beat.state == REPLICA.READY and replica.state == REPLICA.STARTING then
    replica.turn = pool.now
    for _, adapter in ipairs(beat.resident) do replica.resident[adapter] = 1 end
  end
  -- A drain is decided here, and a heartbeat that was already on its way does not undo it.
  if replica.state ~= REPLICA.DRAINING then replica.state = beat.state end
  replica.url, replica.slots, replica.adapter_slots, replica.beat = beat.url, beat.slots, beat.adapter_slots, pool.now
  replica.left, replica.late = beat.left_ms, beat.late_ms
  if beat.cleared then replica.suspect = nil end
  if beat.suspect then replica.suspect = true end
  pool.dirty[replica.id] = true
  reap(pool)
  dispatch(pool)
  close(pool)
  local loads = {}
  for adapter, loading in pairs(replica.loading) do loads[adapter] = loading.source end
  local used = {}
  for adapter, time in pairs(replica.used) do used[adapter] = pool.now - time end
  return cjson.encode({
    state = replica.state, load = replica.load, suspect = replica.suspect or false, epoch = pool.epoch, memory = memory(pool),
    loads = loads, warm = replica.state == REPLICA.STARTING and awaited(pool, replica.adapter_slots) or nil,
    running = replica.running, used = used,
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
      if ticket and ticket.state == TICKET.LOADING then
        tell(ticket, TICKET.GRANTED, grant(pool, ticket))
        count = count + 1
      end
    end
  end
  close(pool)
  return count
end)

-- load_failed(replica id, adapter, reason) → how many tickets failed: only those that waited for this adapter.
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
      if ticket and ticket.state == TICKET.LOADING then
        charge(pool, ticket, -charged(pool, ticket))
        let_go(pool, ticket)
        ticket.state, ticket.placed = TICKET.LOAD_FAILED, nil
        put(pool, ticket)
        tell(ticket, TICKET.LOAD_FAILED, { reason = args[3] })
        count = count + 1
      end
    end
    dispatch(pool)
  end
  close(pool)
  return count
end)

-- evict(replica id, adapter) → 1 if the adapter may be unloaded: no ticket runs with it, and none will be granted with it.
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

-- drain(replica id) → the slots still in use, or -1 if the replica is not known. It gets no new work, and tickets whose adapter was
-- loading go back to the queue.
redis.register_function('lmaas_drain', function(keys, args)
  local pool = open(keys[1])
  local replica = pool.replicas[args[1]]
  if replica then
    replica.state = REPLICA.DRAINING
    pool.dirty[replica.id] = true
    local tickets = {}
    for _, loading in pairs(replica.loading) do
      for id in pairs(loading.tickets) do tickets[#tickets + 1] = get(pool, id) end
    end
    requeue_loading(pool, tickets)
    replica.loading = {}
    dispatch(pool)
  end
  close(pool)
  return replica and replica.load or -1
end)

-- deregister(replica id): removes a replica whose engine is gone.
redis.register_function('lmaas_deregister', function(keys, args)
  local pool = open(keys[1])
  remove(pool, args[1])
  dispatch(pool)
  close(pool)
  ask_for_replica(pool)
  return 1
end)

-- stats(memory, delay_ms, first_ms), called by the controller, which shows that there is one. `delay_ms` is by how much longer than usual a
-- start takes at present, `first_ms` how long one takes if none of this pool is known. → {memory, queued, load, idle_ms, run_ms, start_ms (the usual times of a request and a start), replicas: {id →
-- {state, load, slots, beat_ms, resident, running}}}
register_always('lmaas_stats', function(keys, args)
  local pool = open_as_seen(keys[1], args[1])
  reap(pool)
  dispatch(pool)
  close(pool)
  -- A server that has lost its memory does not know how long the pool has been idle: idleness starts now.
  redis.call('HSETNX', pool.key .. ':vars', 'active', pool.now)
  redis.call('HSET', pool.key .. ':vars', 'controller', pool.now, 'delay_ms', args[2], 'first_ms', args[3])
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
    idle_ms = pool.now - var(pool, 'active', 0), run_ms = var(pool, 'run_ms', TURN_MS), start_ms = var(pool, 'start_ms', START_MS),
    memory = memory(pool),
  })
end)
