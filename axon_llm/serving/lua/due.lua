-- Take members of a schedule whose time has come, and put them off, so that each is handed to one caller.
-- KEYS: schedule · ARGV: limit, milliseconds to put them off. Returns the members.
local now = now_ms()
local members = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', int(now), 'LIMIT', 0, ARGV[1])
for _, member in ipairs(members) do
  redis.call('ZADD', KEYS[1], 'XX', int(now + tonumber(ARGV[2])), member)
end
return members
