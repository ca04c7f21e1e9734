-- Replicas: facts about each, and the indices by which a call finds one among thousands.
--
-- The facts of a replica are its text (see `text_of_replica`) and four small keys of its own about adapters and tickets. A call reads the
-- text of the few replicas that it considers. `index` derives the sorted sets and the sums of the pool from it, before they are read and
-- when the call ends.

local MAX_CANDIDATES = 16 -- replicas that one search considers
local MAX_DUE = 16        -- silent replicas that one call notices
local MAX_GONE = 4        -- replicas that one call removes because they are silent
local NONE = {}           -- the empty list, to be read only

-- What the indices have of a replica: its scores in the sorted sets, false where it is in none, and what it adds to the sums of the pool.
-- These are lists, because a table with names would cost several times as much.
local SETS = { 'free', 'spare', 'crowded', 'starting', 'yielding' }
local SUMS = { 'slots', 'load', 'back', 'able', 'open', 'open_slots', 'room', 'adapters' }
local NOTHING = { false, false, false, false, false, 0, 0, 0, 0, 0, 0, 0, 0 }
-- The share of its slots that a replica has in use is a whole number of these parts, since a fraction costs ten times as much to write.
-- There are enough of them that different shares of up to a million slots stay different.
local PARTS_OF_SHARE = 2 ^ 40

local function entries_of(replica)
  local load, slots, runs, free_adapters = replica.load, replica.slots, replica.runs, replica.adapter_slots - replica.runs
  local ready = replica.state == REPLICA.READY
  local open = ready and not replica.suspect and not replica.stale
  local share = math.floor(load * PARTS_OF_SHARE / math.max(1, slots))
  local free = open and load < slots
  return {
    free and share, free and free_adapters > 0 and share, open and free_adapters <= 0 and runs > 0 and share,
    replica.state == REPLICA.STARTING and replica.since, open and replica.back > 0 and replica.latest, ready and slots or 0, load,
    replica.back, replica.state ~= REPLICA.DRAINING and not replica.suspect and 1 or 0, open and 1 or 0, open and slots or 0,
    free and slots - load or 0, open and math.max(0, free_adapters) or 0,
  }
end

-- Returns the map of a hash that was read whole.
local function pairs_of(stored)
  local found = {}
  for i = 1, #stored, 2 do found[stored[i]] = stored[i + 1] end
  return found
end

-- A replica is stored as four lines:
-- 1. what its last heartbeat said (`said`), if the next one changes nothing when it says the same; see `beat_again`
-- 2. load, back (the slots in use, and those of background tickets), latest (the age of its latest background ticket), runs, has (the
-- numbers
--    of adapters that run and are resident), slots, adapter_slots, life (a number that no other replica had), since, state
-- 3. JSON {suspect, stale (it was found silent), left, late}, or nothing if it has none of them, as mostly
-- 4. its id and URL in JSON (`names`), as replies have them
-- To write and to read this costs half of what JSON of all costs.
local function text_of_replica(replica, number)
  local said, rest = replica.said, ''
  if not said or replica.state == REPLICA.STARTING or replica.suspect or replica.stale then said = '' end
  if replica.suspect or replica.stale or replica.left or replica.late then
    rest = cjson.encode({ suspect = replica.suspect, stale = replica.stale, left = replica.left, late = replica.late })
  end
  return string.format(
    '%s\n%d %d %d %d %d %d %d %d %d %s\n%s\n%s%s', said, replica.load, replica.back, replica.latest, replica.runs, replica.has,
    replica.slots, replica.adapter_slots, replica.life, replica.since, replica.state, rest, replica.names, tail_of(number)
  )
end

-- Reads what `text_of_replica` wrote.
local function parsed(id, stored)
  local said, load, back, latest, runs, has, slots, adapter_slots, life, since, state, rest, names = string.match(
    stored, '^([^\n]*)\n(%d+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d+) (%S+)\n([^\n]*)\n(.-)%s*$'
  )
  local replica = {
    id = id, load = tonumber(load), back = tonumber(back), latest = tonumber(latest), runs = tonumber(runs), has = tonumber(has),
    slots = tonumber(slots), adapter_slots = tonumber(adapter_slots), life = tonumber(life), since = tonumber(since), state = state,
    names = names, said = said ~= '' and said or nil, suspect = nil, stale = nil, left = nil, late = nil, entries = nil, is_moved = false,
    is_dirty = false, is_gone = false,
  }
  if rest ~= '' then
    local found = cjson.decode(rest)
    replica.suspect, replica.stale, replica.left, replica.late = found.suspect, found.stale, found.left, found.late
  end
  return replica
end

local function names_of(id, url)
  return '"replica":' .. cjson.encode(id) .. ',"url":' .. cjson.encode(url)
end

local function url_of(replica)
  return cjson.decode('{' .. replica.names .. '}').url
end

-- Returns a replica, or nil. It is read once in a call.
local function replica_of(pool, id)
  local known = pool.replicas[id]
  if known then return not known.is_gone and known or nil end
  local stored = redis.call('HGET', pool.at.replicas, id)
  if not stored then return nil end
  known = parsed(id, stored)
  known.entries = entries_of(known)
  pool.replicas[id] = known
  return known
end

-- Notes that a replica has changed.
local function changed(pool, replica)
  if not replica.is_moved then
    replica.is_moved, pool.moves = true, pool.moves + 1
    pool.moved[pool.moves] = replica
  end
  if not replica.is_dirty then
    replica.is_dirty, pool.dirties = true, pool.dirties + 1
    pool.dirty[pool.dirties] = replica
  end
end

-- Moves the replicas that have changed to where they belong in the indices.
local function index(pool)
  for number = 1, pool.moves do
    local replica = pool.moved[number]
    local was, is = replica.entries, replica.is_gone and NOTHING or entries_of(replica)
    for i = 1, #SETS do
      if is[i] ~= was[i] then
        if is[i] then
          redis.call('ZADD', pool.at[SETS[i]], is[i], replica.id)
        else
          redis.call('ZREM', pool.at[SETS[i]], replica.id)
        end
      end
    end
    for i = 1, #SUMS do
      local difference = is[#SETS + i] - was[#SETS + i]
      if difference ~= 0 then set_var(pool, SUMS[i], var(pool, SUMS[i], 0) + difference) end
    end
    replica.entries, replica.is_moved = is, false
  end
  pool.moves = 0
end

-- Writes what a call has changed.
local function close(pool)
  index(pool)
  for number = 1, pool.dirties do
    local replica = pool.dirty[number]
    if replica.is_gone then
      redis.call('HDEL', pool.at.replicas, replica.id)
    else
      replica.is_dirty = false
      redis.call('HSET', pool.at.replicas, replica.id, text_of_replica(replica, pool.vars.mark))
    end
  end
  pool.dirties = 0
  write_rest(pool)
end

stands = function(pool, ticket)
  local replica = replica_of(pool, ticket.replica)
  return replica and replica.life == ticket.life and not (ticket.state == TICKET.LOADING and replica.state == REPLICA.DRAINING)
end

-- Creates a replica that has just been heard of.
local function add_replica(pool, id)
  local replica = {
    id = id, life = next_of(pool, 'lives'), since = pool.now, state = REPLICA.STARTING, load = 0, back = 0, latest = 0, runs = 0, has = 0,
    slots = 0, adapter_slots = 0, names = names_of(id, ''), entries = NOTHING, is_moved = false, is_dirty = false, is_gone = false,
  }
  pool.replicas[id] = replica
  return replica
end

-- Returns when the replica sent its last heartbeat.
local function beat_of(pool, replica)
  return tonumber(redis.call('ZSCORE', pool.at.due, replica.id)) - (replica.stale and GONE_MS + 1 or STALE_MS)
end

-- Returns whether a replica gets new work. The call has swept.
local function fresh(pool, replica)
  if replica.state ~= REPLICA.READY or replica.suspect or replica.stale then return false end
  return not pool.unswept or pool.now - beat_of(pool, replica) < STALE_MS
end

-- Notes that a replica has been silent for too long. Its next heartbeat brings it back.
local function set_stale(pool, replica)
  if replica.stale then return end
  redis.call('ZADD', pool.at.due, beat_of(pool, replica) + GONE_MS + 1, replica.id)
  replica.stale = true
  changed(pool, replica)
end

-- Returns whether neither replicas nor tickets have been silent for too long. Mostly this is known without looking.
local function is_calm(pool)
  return pool.now < pool.vars.calm
end

-- Notes which replicas have been silent for too long, once in a call. Returns those that are gone. `unswept`: there may be more.
local function sweep(pool)
  if pool.gone then return pool.gone end
  if is_calm(pool) then return NONE end
  pool.gone = {}
  local found = redis.call('ZRANGEBYSCORE', pool.at.due, '-inf', pool.now, 'LIMIT', 0, MAX_DUE)
  for _, id in ipairs(found) do
    local replica = replica_of(pool, id)
    if pool.now - beat_of(pool, replica) > GONE_MS then pool.gone[#pool.gone + 1] = id end
    set_stale(pool, replica)
  end
  pool.unswept = #found == MAX_DUE
  return pool.gone
end

-- Notes until when the pool is calm, after a call has reaped. Whatever is due later than its first entries will be due later than that, and
-- what comes from now on is due later than STALE_MS.
local function note_calm(pool)
  local calm = pool.now + math.min(STALE_MS, LEASE_MS)
  for _, key in ipairs({ pool.at.due, pool.at.expiry }) do
    local first = redis.call('ZRANGE', key, 0, 0, 'WITHSCORES')[2]
    if first then calm = math.min(calm, tonumber(first)) end
  end
  set_var(pool, 'calm', calm)
end

local function is_resident(pool, replica, adapter)
  return redis.call('SISMEMBER', pool.key .. ':resident:' .. replica.id, adapter) == 1
end

local function set_resident(pool, replica, adapter)
  if redis.call('SADD', pool.key .. ':resident:' .. replica.id, adapter) == 0 then return end
  replica.has = replica.has + 1
  redis.call('ZADD', pool.key .. ':has:' .. adapter, 0, replica.id)
  changed(pool, replica)
end

local function unset_resident(pool, replica, adapter)
  if redis.call('SREM', pool.key .. ':resident:' .. replica.id, adapter) == 0 then return end
  replica.has = replica.has - 1
  redis.call('ZREM', pool.key .. ':has:' .. adapter, replica.id)
  changed(pool, replica)
end

local function waits_on(pool, replica_id, adapter)
  return pool.key .. ':waits:' .. replica_id .. '|' .. adapter
end

-- Lets a ticket take slots, and its adapter an adapter slot.
local function hold(pool, ticket, replica)
  index(pool) -- the pool's sums are read
  -- A ticket that needs more slots than the replica has takes all of them. The next replica may have more.
  ticket.held, ticket.replica, ticket.life = math.min(ticket.weight, replica.slots), replica.id, replica.life
  replica.load = replica.load + ticket.held
  if ticket.background then
    replica.back, replica.latest = replica.back + ticket.held, next_of(pool, 'ages')
    redis.call('ZADD', pool.key .. ':back:' .. replica.id, replica.latest, ticket.id)
  else
    -- It shows waiting tickets whether turns take longer than usual.
    set_var(pool, 'turn', pool.now)
  end
  redis.call('ZADD', pool.key .. ':held:' .. replica.id, ticket.sequence or 0, ticket.id)
  if ticket.adapter ~= '' then
    if redis.call('HINCRBY', pool.key .. ':running:' .. replica.id, ticket.adapter, 1) == 1 then
      replica.runs = replica.runs + 1
      redis.call('ZADD', pool.key .. ':runs:' .. ticket.adapter, 0, replica.id)
    end
    redis.call('HSET', pool.key .. ':used:' .. replica.id, ticket.adapter, pool.now)
  end
  changed(pool, replica)
end

-- Frees what a ticket holds. A ticket of a replica that is gone holds nothing.
local function let_go(pool, ticket)
  local id, held, life = ticket.replica, ticket.held, ticket.life
  ticket.replica, ticket.held, ticket.life = nil, nil, nil
  local replica = id and replica_of(pool, id)
  if not replica or replica.life ~= life then return end
  replica.load = math.max(0, replica.load - held)
  redis.call('ZREM', pool.key .. ':held:' .. id, ticket.id)
  if ticket.background then
    replica.back = math.max(0, replica.back - held)
    redis.call('ZREM', pool.key .. ':back:' .. id, ticket.id)
  end
  if ticket.adapter ~= '' then
    if redis.call('HINCRBY', pool.key .. ':running:' .. id, ticket.adapter, -1) == 0 then
      replica.runs = replica.runs - 1
      redis.call('HDEL', pool.key .. ':running:' .. id, ticket.adapter)
      redis.call('ZREM', pool.key .. ':runs:' .. ticket.adapter, id)
    end
    if ticket.state == TICKET.LOADING then redis.call('ZREM', waits_on(pool, id, ticket.adapter), ticket.id) end
  end
  changed(pool, replica)
end

-- Lists the tickets of a sorted set as those that have lost their place. Calls take them back in portions; see `displace`.
local function list_as_lost(pool, keys)
  local target = pool.key .. ':lost:' .. next_of(pool, 'lives')
  -- One key is only renamed, whatever the number of its tickets.
  if #keys == 1 and redis.call('EXISTS', keys[1]) == 1 then
    redis.call('RENAME', keys[1], target)
  elseif #keys > 1 then
    redis.call('ZUNIONSTORE', target, #keys, unpack(keys))
    redis.call('UNLINK', unpack(keys))
  end
  if redis.call('EXISTS', target) == 1 then
    redis.call('RPUSH', pool.key .. ':lost', string.sub(target, #pool.key + 7))
    set_var(pool, 'lost', pool.vars.lost + 1)
  end
end

-- Ends the loading of all adapters on a replica.
local function stop_loading(pool, replica)
  local keys = {}
  for _, adapter in ipairs(redis.call('HKEYS', pool.key .. ':loading:' .. replica.id)) do
    keys[#keys + 1] = waits_on(pool, replica.id, adapter)
  end
  set_var(pool, 'loading', pool.vars.loading - #keys)
  redis.call('DEL', pool.key .. ':loading:' .. replica.id)
  return keys
end

-- Removes a replica and all facts about it. Its tickets have lost their place.
local function remove_replica(pool, replica)
  local id = replica.id
  replica.is_gone = true
  changed(pool, replica)
  for _, key in ipairs(stop_loading(pool, replica)) do redis.call('UNLINK', key) end
  local running, resident = pool.key .. ':running:' .. id, pool.key .. ':resident:' .. id
  for _, adapter in ipairs(redis.call('HKEYS', running)) do redis.call('ZREM', pool.key .. ':runs:' .. adapter, id) end
  for _, adapter in ipairs(redis.call('SMEMBERS', resident)) do redis.call('ZREM', pool.key .. ':has:' .. adapter, id) end
  redis.call('UNLINK', running, resident, pool.key .. ':used:' .. id, pool.key .. ':back:' .. id)
  redis.call('ZREM', pool.at.due, id)
  list_as_lost(pool, { pool.key .. ':held:' .. id })
end

-- Returns the first of the replicas `ids` for which `fits` is true.
local function first_that_fits(pool, ids, fits, from)
  for i = from or 1, #ids do
    local replica = replica_of(pool, ids[i])
    if not fresh(pool, replica) then
      set_stale(pool, replica)
    elseif fits(replica) then
      return replica
    end
  end
  return nil
end

-- Returns the least loaded replica in the index `name` for which `fits` is true, or nil. It considers the first `window` of the index.
local function least_loaded(pool, name, fits, window)
  local first = first_that_fits(pool, redis.call('ZRANGE', pool.at[name], 0, 0), fits)
  if first then return first end
  return first_that_fits(pool, redis.call('ZRANGE', pool.at[name], 0, window - 1), fits, 2)
end

-- Returns the same among the replicas that are in the set `members` too. If these are more than `window`, it considers the first of either.
local function least_loaded_of(pool, name, members, fits, window)
  local top = redis.call('ZRANGE', pool.at[name], 0, 0)
  if #top == 0 then return nil end
  if redis.call('ZSCORE', members, top[1]) then
    local first = first_that_fits(pool, top, fits)
    if first then return first end
  end
  local ids = redis.call('ZRANGE', members, 0, window - 1)
  if #ids == 0 then return nil end
  if #ids == window then
    local least, found = redis.call('ZRANGE', pool.at[name], 0, window - 1), {}
    for i, score in ipairs(redis.call('ZMSCORE', members, unpack(least))) do
      if score then found[#found + 1] = least[i] end
    end
    local first = first_that_fits(pool, found, fits)
    if first then return first end
  end
  local shares, found = {}, {}
  for i, score in ipairs(redis.call('ZMSCORE', pool.at[name], unpack(ids))) do
    if score then
      found[#found + 1] = ids[i]
      shares[ids[i]] = tonumber(score)
    end
  end
  table.sort(found, function(one, other)
    if shares[one] == shares[other] then return one < other end
    return shares[one] < shares[other]
  end)
  return first_that_fits(pool, found, fits)
end
