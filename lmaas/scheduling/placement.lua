-- Placement: the replica on which a ticket runs. An adapter slot is a resource like a sequence slot: an engine that runs more distinct
-- adapters than it has slots for works on them one after the other. So a ticket may be passed over for one behind it that fits now,
-- within a bound.

local MAX_KEPT = 16       -- adapter slots and replicas kept free in one round
local MAX_CROWDED = 4     -- replicas whose adapter slots are considered for that

-- What is kept free for tickets that have waited for too long: `at` is replica id → {whole, victims: {adapter}, holders: {adapter}}, and
-- the adapter slots of the victims are emptied for the holders. `count` is how many replicas there are in it, `keeps` how often something
-- was kept, and `holders` are all adapters for which a slot is.
local function nothing_kept()
  return { at = {}, count = 0, keeps = 0, holders = {} }
end

local NOTHING_KEPT = nothing_kept() -- to be read only

-- Returns whether a replica is open to a ticket although something may be kept free there. `runs`: its adapter runs there.
local function left_by(kept, replica, adapter, runs)
  local here = kept.at[replica.id]
  if not here then return true end
  if here.whole then return false end
  if adapter == '' then return true end
  if runs then return not here.victims[adapter] end
  return here.holders[adapter] or false
end

-- Returns the replica for a ticket: first where its adapter runs, then where it is resident, then where an adapter slot is free; among
-- equals the least loaded, then the first by name. Of an adapter that is on more than MAX_CANDIDATES replicas, and of replicas with
-- different numbers of slots, it may not see the very best one. It also returns true if the adapter is known to be resident there. `bounds`
-- are those of a background ticket: the `slots` that it may take, and whether only the adapters that run may be used (`runs_only`).
local function choose(pool, weight, adapter, kept, bounds)
  sweep(pool)
  index(pool)
  local runs, window = false, MAX_CANDIDATES + kept.count
  local function fits(replica)
    local slots = math.min(weight, replica.slots)
    return replica.load + slots <= replica.slots and (not bounds or slots <= bounds.slots) and left_by(kept, replica, adapter, runs)
  end
  if adapter == '' then return least_loaded(pool, 'free', fits, window) end
  runs = true
  local found = least_loaded_of(pool, 'free', pool.key .. ':runs:' .. adapter, fits, window)
  if found or (bounds and bounds.runs_only) then return found end
  runs = false
  found = least_loaded_of(pool, 'spare', pool.key .. ':has:' .. adapter, fits, window)
  if found then return found, true end
  return least_loaded(pool, 'spare', fits, window)
end

local function keep(kept, id)
  if not kept.at[id] then
    kept.at[id] = { victims = {}, holders = {} }
    kept.count = kept.count + 1
  end
  kept.keeps = kept.keeps + 1
  return kept.at[id]
end

-- Returns the adapters that run on the least loaded replicas without a free adapter slot, those with the fewest tickets first, as
-- {replica id, adapter, tickets}.
local function victims_of(pool)
  local found = {}
  for _, id in ipairs(redis.call('ZRANGE', pool.at.crowded, 0, MAX_CROWDED - 1)) do
    local running = redis.call('HGETALL', pool.key .. ':running:' .. id)
    for i = 1, #running, 2 do found[#found + 1] = { id, running[i], tonumber(running[i + 1]) } end
  end
  table.sort(found, function(one, other)
    if one[3] == other[3] then return one[1] .. one[2] < other[1] .. other[2] end
    return one[3] < other[3]
  end)
  return found
end

-- Keeps an adapter slot free: the one with the fewest tickets, which is probably empty first.
local function keep_adapter_slot(pool, adapter, kept)
  if kept.holders[adapter] or kept.keeps >= MAX_KEPT then return end
  kept.victims = kept.victims or victims_of(pool)
  local runs_on = {}
  for _, victim in ipairs(kept.victims) do
    if victim[2] == adapter then runs_on[victim[1]] = true end
  end
  for _, victim in ipairs(kept.victims) do
    local id, here = victim[1], kept.at[victim[1]]
    if not runs_on[id] and not (here and (here.whole or here.victims[victim[2]])) then
      here = keep(kept, id)
      here.victims[victim[2]], here.holders[adapter], kept.holders[adapter] = true, true, true
      return
    end
  end
end

-- Keeps a whole replica free: the least loaded one.
local function keep_replica(pool, kept)
  if kept.keeps >= MAX_KEPT then return end
  for _, id in ipairs(redis.call('ZRANGE', pool.at.free, 0, kept.count)) do
    if not (kept.at[id] and kept.at[id].whole) then
      keep(kept, id).whole = true
      return
    end
  end
end
