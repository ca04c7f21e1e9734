-- The functions. See layout.lua for the keys that they use.

-- Registers a function that is accepted by a server that has no memory left, because it frees memory or leads to that.
local function register_always(name, callback)
  redis.register_function({ function_name = name, callback = callback, flags = { 'allow-oom' } })
end

-- Returns the refusal if the tenant's queue or the pool's is full, else nil.
local function full(pool, ticket, max_queued, max_queued_pool)
  if ticket.background then
    if pool.vars.background_queued < MAX_BACKGROUND_QUEUED then return nil end
    return { state = NO_TICKET.REFUSED_BY_POOL, wait_ms = pool.vars.run_ms }
  end
  local queued = pool.vars.queued
  local own = queued > 0 and redis.call('ZCARD', pool.key .. ':queue:' .. ticket.tenant) or 0
  if own >= max_queued then return { state = NO_TICKET.REFUSED } end
  if queued >= max_queued_pool then return { state = NO_TICKET.REFUSED_BY_POOL, wait_ms = estimate(pool, queued).wait_ms } end
  return nil
end

-- Returns what a client sends with a ticket for this call only (`Ticket.terms` in client.py): how long it has waited, how often it was
-- delivered, how many tickets may wait (of the tenant, in the pool), and the limits. It is a MessagePack array whose last value is the
-- array of the limits, each of which is an array.
local function terms_of(text)
  local at, waited_ms, attempts, max_queued, max_queued_pool = cmsgpack.unpack_limit(text, 4, 1)
  local limits = {}
  for i = 1, string.byte(text, at + 1) - 144 do -- 144 is the head of an empty array; at most 15 are so short
    local next_at, id, scope, requests, tokens, concurrent, month, budget = cmsgpack.unpack_limit(text, 7, at + 2)
    limits[i] = {
      id = id, scope = scope, requests_per_minute = requests, tokens_per_minute = tokens, max_concurrent = concurrent,
      tokens_per_month = month, budget_per_month = budget,
    }
    at = next_at - 1
  end
  return waited_ms, attempts, max_queued, max_queued_pool, limits
end

-- Returns what is left of the limits as JSON, as a field of a reply.
local function text_of_left(left)
  local requests, tokens = left[LIMIT.REQUESTS], left[LIMIT.TOKENS]
  return string.format(
    ',"left":{%s%s%s}',
    requests and string.format('"%s":[%.0f,%.0f,%.0f]', LIMIT.REQUESTS, requests[1], requests[2], requests[3]) or '',
    requests and tokens and ',' or '',
    tokens and string.format('"%s":[%.0f,%.0f,%.0f]', LIMIT.TOKENS, tokens[1], tokens[2], tokens[3]) or ''
  )
end

-- submit(ticket, terms (see `terms_of`), seeds JSON {scope → [month, tokens, cost]} or '') → report, with what is left of the limits.
-- Submitting a ticket again changes nothing.
redis.register_function('lmaas_submit', function(keys, args)
  local pool = open(keys[1])
  if reap(pool) then dispatch(pool) end
  local ticket = ticket_from(args[1], 0)
  -- The tickets with a lease are those that exist.
  local is_new = redis.call('ZADD', pool.at.expiry, 'NX', pool.now + LEASE_MS, ticket.id) == 1
  local known, left = not is_new and get(pool, ticket.id), nil
  if not known then
    local waited_ms, attempts, max_queued, max_queued_pool, limits = terms_of(args[2])
    -- A ticket that has waited already was accepted before this server lost its memory.
    local accepted = waited_ms > 0
    if args[3] ~= '' then take_seeds(pool, cjson.decode(args[3])) end
    local refused = not accepted and full(pool, ticket, max_queued, max_queued_pool) or nil
    if not refused then refused, left = reserve(pool, ticket, limits, accepted) end
    if refused then
      redis.call('ZREM', pool.at.expiry, ticket.id)
      close(pool)
      return cjson.encode(refused)
    end
    -- A ticket that is submitted again after the server lost its memory has waited, and perhaps been delivered, before.
    ticket.attempts, ticket.submitted = attempts, pool.now - waited_ms
    if not ticket.background then
      set_var(pool, 'active', pool.now)
      set_var(pool, 'arrived', pool.now)
    end
    if place_at_once(pool, ticket) then
      dispatch(pool) -- background tickets may wait
    else
      enqueue(pool, ticket, false)
      dispatch(pool, ticket.id)
      ask_for_replica(pool)
    end
    known = ticket
  else
    dispatch(pool, ticket.id)
  end
  if known.state == TICKET.GRANTED then
    local names = replica_of(pool, known.replica).names
    close(pool)
    return string.format(
      '{"state":"%s","attempts":%d,%s,"queue_ms":%.0f,"load_ms":%.0f,"epoch":"%s","memory":"%s"%s}%s', known.state, known.attempts, names,
      known.placed - known.submitted, known.granted - known.placed, pool.epoch, memory(pool), left and text_of_left(left) or '',
      tail_of(pool.vars.mark)
    )
  end
  local reply = report(pool, known)
  close(pool)
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
    if args[3] ~= '' and not ticket.background then set_var(pool, 'run_ms', average(pool.vars.run_ms, tonumber(args[3]))) end
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
      local replica = replica_of(pool, args[2])
      if replica then
        -- It gets no new work until its supervisor has probed the engine.
        if args[3] == REASON.ENGINE then replica.suspect = true end
        if args[3] == REASON.ADAPTER then unset_resident(pool, replica, ticket.adapter) end
        changed(pool, replica)
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
  local reports, active = {}, false
  for i = 2, #args, 2 do
    local ticket = get(pool, args[i])
    active = active or not (ticket and ticket.background)
    if ticket then
      redis.call('ZADD', pool.at.expiry, pool.now + LEASE_MS, ticket.id)
      -- A checkpoint of an earlier delivery may come late: a ticket that waits or loads has not run.
      local may_run = ticket.state == TICKET.GRANTED or ticket.state == TICKET.REVOKED or ticket.state == TICKET.YIELDED
      if args[i + 1] ~= '' and may_run then
        local before = charged(pool, ticket)
        redis.call('HSET', pool.at.progress, ticket.id, args[i + 1])
        if ticket.placed and ticket.state ~= TICKET.YIELDED then charge(pool, ticket, units(tokens_of(args[i + 1])) - before) end
      end
    end
  end
  reap(pool)
  dispatch(pool)
  for i = 2, #args, 2 do
    local ticket = get(pool, args[i])
    reports[#reports + 1] = ticket and report(pool, ticket) or { state = NO_TICKET.UNKNOWN }
  end
  if active then set_var(pool, 'active', pool.now) end
  close(pool)
  return cjson.encode({ epoch = pool.epoch, memory = memory(pool), tickets = reports })
end)

-- restore(ticket, terms (see `terms_of`), replica id) → 1, or 0 while its replica is not back. After the server has lost its memory, a
-- gateway puts back what runs.
redis.register_function('lmaas_restore', function(keys, args)
  local pool = open(keys[1])
  local ticket = ticket_from(args[1], 0)
  local replica = replica_of(pool, args[3])
  local done = 0
  if get(pool, ticket.id) then
    dispatch(pool)
    done = 1
  elseif replica then
    local waited_ms, attempts, _, _, limits = terms_of(args[2])
    ticket.state, ticket.attempts, ticket.submitted = TICKET.GRANTED, attempts, pool.now - waited_ms
    ticket.placed, ticket.granted = pool.now, pool.now
    if not ticket.background then set_var(pool, 'arrived', pool.now) end
    reserve(pool, ticket, limits, true)
    charge(pool, ticket, PROMPT_COST * ticket.prompt_tokens)
    hold(pool, ticket, replica)
    put(pool, ticket)
    redis.call('ZADD', pool.at.expiry, pool.now + LEASE_MS, ticket.id)
    -- A waiting ticket may share its adapter slot.
    dispatch(pool)
    done = 1
  end
  close(pool)
  return done
end)

-- Does the work of a heartbeat that is the same as the replica's last one and finds nothing to do, as nearly all are: no ticket waits, no
-- adapter is to be loaded, and the pool is calm. Returns the reply, or nil if `lmaas_heartbeat` has to do it; then nothing has changed.
-- The result is the same in either case, but this costs little, in a fleet whose heartbeats are most of its calls.
local function beat_again(prefix, id, said, seen_text)
  local seen = seen_last[prefix]
  local stored = seen and redis.call('HGET', names[prefix].replicas, id)
  if not stored or string.find(stored, said, 1, true) ~= 1 or string.byte(stored, #said + 1) ~= 10 then return nil end -- 10 is '\n'
  local key, vars = names[prefix].vars, the_pool.vars
  local figures = redis.call('HGET', key, FIGURES_FIELD)
  if not figures then return nil end
  read_figures(vars, figures)
  local run, seen_mark = string.match(seen_text, '^(%w+) (%d+)$')
  if vars.mark ~= seen.mark or run ~= process or tonumber(seen_mark) > vars.mark then return nil end
  local wall = time_now()
  local now = wall + vars.offset
  if wall < vars.reaped or wall - vars.reaped > AWAY_MS or now >= vars.calm or vars.lost > 0 then return nil end
  if vars.queued > 0 or vars.background_queued > 0 or vars.loading > 0 then return nil end
  seen.mark, vars.mark, vars.reaped = vars.mark + 1, vars.mark + 1, wall
  write_figures(key, vars, seen)
  redis.call('ZADD', names[prefix].due, now + STALE_MS, id)
  local load, back, state = string.match(stored, '^(%d+) (%d+) [%d ]+ (%S+)\n', #said + 2)
  return string.format(
    '{"state":"%s","load":%s,"background":%s,"suspect":false,"epoch":"%s","memory":"%s %.0f","loads":{},"running":{},"used":{},'
      .. '"controller":%s}%s',
    state, load, back, seen.epoch, process, vars.mark, tostring(now - vars.controller < PRESENT_MS), tail_of(vars.mark)
  )
end

-- heartbeat(replica id, JSON {url, slots, adapter_slots, state, cleared, suspect, start_ms, left_ms, late_ms}, memory, JSON of the resident
-- adapters) → {state, load, background (the slots of background tickets, of the load), suspect, epoch, memory, loads: {adapter → source},
-- warm: {adapter → source}, running: {adapter of `loads` → tickets that wait for it}, used: {adapter → ms ago}}. `warm` are the adapters
-- that the queue needs first, for an engine that starts. `used` is reported if there is something to load, since another adapter may have
-- to make room. The resident adapters are read only when the scheduler does not know them.
redis.register_function('lmaas_heartbeat', function(keys, args)
  local again = beat_again(keys[1], args[1], args[2], args[3])
  if again then return again end
  local pool = open_as_seen(keys[1], args[3])
  local beat = cjson.decode(args[2])
  local replica = replica_of(pool, args[1])
  if not replica then
    replica = add_replica(pool, args[1])
    for _, adapter in ipairs(cjson.decode(args[4])) do set_resident(pool, replica, adapter) end
  end
  -- The usual time of the pool's starts, from the records that supervisors keep.
  if beat.start_ms and beat.start_ms ~= var(pool, 'start_ms', nil) then set_var(pool, 'start_ms', beat.start_ms) end
  if beat.state == REPLICA.READY and replica.state == REPLICA.STARTING then
    set_var(pool, 'turn', pool.now)
    for _, adapter in ipairs(cjson.decode(args[4])) do set_resident(pool, replica, adapter) end
  end
  -- A drain is decided here, and a heartbeat that was already on its way does not undo it.
  if replica.state ~= REPLICA.DRAINING then replica.state = beat.state end
  replica.names, replica.slots, replica.adapter_slots = names_of(replica.id, beat.url), beat.slots, beat.adapter_slots
  replica.said = not beat.start_ms and not string.find(args[2], '\n', 1, true) and args[2] or nil
  replica.left, replica.late, replica.stale = beat.left_ms, beat.late_ms, nil
  if beat.cleared then replica.suspect = nil end
  if beat.suspect then replica.suspect = true end
  redis.call('ZADD', pool.at.due, pool.now + STALE_MS, replica.id)
  changed(pool, replica)
  reap(pool)
  dispatch(pool)
  local running, used, loads = {}, {}, pairs_of(redis.call('HGETALL', pool.key .. ':loading:' .. replica.id))
  if next(loads) then
    for adapter in pairs(loads) do running[adapter] = redis.call('ZCARD', waits_on(pool, replica.id, adapter)) end
    for adapter, time in pairs(pairs_of(redis.call('HGETALL', pool.key .. ':used:' .. replica.id))) do used[adapter] = pool.now - time end
  end
  local warm = replica.state == REPLICA.STARTING and awaited(pool, replica.adapter_slots) or nil
  close(pool)
  return cjson.encode({
    state = replica.state, load = replica.load, background = replica.back, suspect = replica.suspect or false, epoch = pool.epoch,
    memory = memory(pool), loads = loads, warm = warm, running = running, used = used,
    controller = pool.now - pool.vars.controller < PRESENT_MS,
  })
end)

-- Ends the loading of an adapter on a replica. Returns the tickets that wait for it there.
local function loading_ended(pool, replica, adapter)
  local key, tickets = waits_on(pool, replica.id, adapter), {}
  for _, id in ipairs(redis.call('ZRANGE', key, 0, -1)) do
    local ticket = get(pool, id)
    if ticket and ticket.state == TICKET.LOADING then tickets[#tickets + 1] = ticket end
  end
  redis.call('DEL', key)
  set_var(pool, 'loading', pool.vars.loading - redis.call('HDEL', pool.key .. ':loading:' .. replica.id, adapter))
  return tickets
end

-- loaded(replica id, adapter) → how many tickets were granted.
redis.register_function('lmaas_loaded', function(keys, args)
  local pool = open(keys[1])
  local replica = replica_of(pool, args[1])
  local tickets = {}
  if replica then
    set_resident(pool, replica, args[2])
    tickets = loading_ended(pool, replica, args[2])
    for _, ticket in ipairs(tickets) do
      grant(pool, ticket)
      tell(ticket, TICKET.GRANTED, lease_of(pool, ticket))
    end
  end
  close(pool)
  return #tickets
end)

-- load_failed(replica id, adapter, reason) → how many tickets failed: only those that waited for this adapter.
redis.register_function('lmaas_load_failed', function(keys, args)
  local pool = open(keys[1])
  local replica = replica_of(pool, args[1])
  local tickets = {}
  if replica then
    tickets = loading_ended(pool, replica, args[2])
    for _, ticket in ipairs(tickets) do
      charge(pool, ticket, -charged(pool, ticket))
      let_go(pool, ticket)
      ticket.state, ticket.placed = TICKET.LOAD_FAILED, nil
      put(pool, ticket)
      tell(ticket, TICKET.LOAD_FAILED, { reason = args[3] })
    end
    dispatch(pool)
  end
  close(pool)
  return #tickets
end)

-- evict(replica id, adapter) → 1 if the adapter may be unloaded: no ticket runs with it, and none will be granted with it.
redis.register_function('lmaas_evict', function(keys, args)
  local pool = open(keys[1])
  local replica = replica_of(pool, args[1])
  local free = replica and redis.call('HEXISTS', pool.key .. ':running:' .. args[1], args[2]) == 0
  if free then
    unset_resident(pool, replica, args[2])
    redis.call('HDEL', pool.key .. ':used:' .. args[1], args[2])
  end
  close(pool)
  return free and 1 or 0
end)

-- drain(replica id) → the slots still in use, or -1 if the replica is not known. It gets no new work, tickets whose adapter was
-- loading go back to the queue, and background tickets that run are put back.
redis.register_function('lmaas_drain', function(keys, args)
  local pool = open(keys[1])
  local replica = replica_of(pool, args[1])
  if replica then
    replica.state = REPLICA.DRAINING
    changed(pool, replica)
    list_as_lost(pool, stop_loading(pool, replica))
    take_back_lost(pool)
    put_back_all(pool, replica)
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
  ask_for_replica(pool)
  close(pool)
  return 1
end)

-- stats(memory, delay_ms, first_ms), called by the controller, which shows that there is one. `delay_ms` is by how much longer than usual
-- a start takes at present, `first_ms` how long one takes if none of this pool is known. → {JSON {memory, now, stale_after, gone_after,
-- queued, load, idle_ms, run_ms, start_ms (the usual times of a request and a start), all of interactive tickets, and background: {queued,
-- load, yields, reserve}}, [replica id, its text (see `text_of_replica`), …], [replica id, when its silence matters next, …]}. idle_ms is
-- null if there was no interactive ticket in this memory. Its client decodes the replicas, since they may be thousands.
register_always('lmaas_stats', function(keys, args)
  local pool = open_as_seen(keys[1], args[1])
  reap(pool)
  dispatch(pool)
  set_var(pool, 'controller', pool.now)
  set_var(pool, 'delay_ms', tonumber(args[2]))
  set_var(pool, 'first_ms', tonumber(args[3]))
  close(pool)
  local head = cjson.encode({
    queued = pool.vars.queued, load = pool.vars.load - pool.vars.back, now = pool.now, memory = memory(pool),
    stale_after = STALE_MS, gone_after = GONE_MS + 1, run_ms = pool.vars.run_ms, start_ms = var(pool, 'start_ms', START_MS),
    idle_ms = pool.vars.active > 0 and pool.now - pool.vars.active or cjson.null,
    background = {
      queued = pool.vars.background_queued, load = pool.vars.back, yields = var(pool, 'yields', 0),
      reserve = reserve_of(pool),
    },
  })
  return { head, redis.call('HGETALL', pool.at.replicas), redis.call('ZRANGE', pool.at.due, 0, -1, 'WITHSCORES') }
end)

-- room(memory) → {memory, ready (replicas that get work), slots (of them), room (slots that background tickets could get now), queued
-- (background tickets)}.
register_always('lmaas_room', function(keys, args)
  local pool = open_as_seen(keys[1], args[1])
  reap(pool)
  dispatch(pool)
  close(pool)
  local bounds = pool.vars.queued == 0 and bounds_of_background(pool)
  return cjson.encode({
    ready = var(pool, 'open', 0), slots = var(pool, 'open_slots', 0), room = bounds and bounds.slots or 0,
    queued = pool.vars.background_queued, memory = memory(pool),
  })
end)
