-- The reserve: how many free slots of a pool background tickets leave to interactive ones that may come. It follows how often background
-- tickets had to be put back, and it is 0 where that did not happen lately.

local TRAFFIC_MS = 60000 -- interactive work is recent for this long after its last ticket came
local BOOST_MS = 60000   -- in this time, half of what was put back is forgotten

-- Returns whether interactive tickets came lately.
local function is_busy(pool)
  return pool.vars.arrived > 0 and pool.now - pool.vars.arrived < TRAFFIC_MS
end

-- Returns how many slots were put back lately.
local function put_back_lately(pool)
  return var(pool, 'boost', 0) * BOOST_MS / (BOOST_MS + math.max(0, pool.now - var(pool, 'boost_at', 0)))
end

-- Notes that background tickets with `slots` slots had to be put back.
local function see_yield(pool, slots)
  set_var(pool, 'boost', put_back_lately(pool) + slots)
  set_var(pool, 'boost_at', pool.now)
end

-- Returns the reserve: what had to be put back lately, at most half of the slots; 0 if interactive work is not recent.
local function reserve_of(pool)
  if not is_busy(pool) then return 0 end
  return math.min(math.floor(var(pool, 'open_slots', 0) / 2), math.floor(put_back_lately(pool) + 0.5))
end
