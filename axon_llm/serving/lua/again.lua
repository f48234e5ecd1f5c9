-- Note that a job which the broker had was published again.
-- KEYS: job. Returns nothing.
if redis.call('EXISTS', KEYS[1]) == 1 then
  redis.call('HSET', KEYS[1], 'again', '1')
end
