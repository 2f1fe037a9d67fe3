-- The moments whose states make up Feast's view user_activity. A training join puts a table of this name before it on its search
-- path, with the few moments its rows need: what that leaves out only makes a row older, and a moment that is not before
-- the row's time is refused by the join all the same.
CREATE VIEW activity_moments AS SELECT DISTINCT user_id, occurred_at FROM events;
