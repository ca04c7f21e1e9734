-- The reserve: how many free slots of a pool background tickets leave to interactive ones that may come. It follows what interactive work
-- did lately, so that few background tickets have to be put back, and it is 0 where there was no interactive work for a minute.

local TRAFFIC_MS = 60000 -- after the last interactive ticket came, something is reserved for this long
local PEAK_MS = 5000     -- in this time, half of the difference between the latest peak and the present load is forgotten
local BOOST_MS = 60000   -- and half of what was added because background tickets had to be put back

-- Returns whether interactive tickets came lately.
local function is_busy(pool)
  local arrived = var(pool, 'arrived', nil)
  return arrived ~= nil and pool.now - arrived < TRAFFIC_MS
end

-- Returns a value as it has faded since `at`.
local function faded(pool, value, at, half_ms)
  return value * half_ms / (half_ms + math.max(0, pool.now - at))
end

-- Returns by how much the latest peak of the interactive load (in slots) is above the load `now_taken`, as it has faded.
local function above(pool, now_taken)
  return faded(pool, math.max(0, var(pool, 'peak', 0) - now_taken), var(pool, 'peak_at', 0), PEAK_MS)
end

-- Notes that an interactive ticket takes slots. `taken` are those that interactive tickets have before.
local function see_growth(pool, taken, slots)
  set_var(pool, 'peak', math.max(taken + above(pool, taken), taken + slots))
  set_var(pool, 'peak_at', pool.now)
end

-- Notes that background tickets with `slots` slots had to be put back.
local function see_yield(pool, slots)
  set_var(pool, 'boost', faded(pool, var(pool, 'boost', 0), var(pool, 'boost_at', 0), BOOST_MS) + slots)
  set_var(pool, 'boost_at', pool.now)
end

-- Returns the reserve: what the interactive load needs to reach its latest peak again, or one slot and what had to be put back lately;
-- at most half of the slots.
local function reserve_of(pool)
  if not is_busy(pool) then return 0 end
  local peak, boost = above(pool, var(pool, 'load', 0) - var(pool, 'back', 0)), faded(pool, var(pool, 'boost', 0), var(pool, 'boost_at', 0), BOOST_MS)
  return math.min(math.floor(var(pool, 'open_slots', 0) / 2), math.floor(math.max(peak, 1 + boost) + 0.5))
end
