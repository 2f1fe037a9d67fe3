-- A customer's purchases, found without reading all their events: of 150 events, none of them bought, the state took 236 us, now 95.
CREATE INDEX events_purchases ON events (user_id, item_id, occurred_at) WHERE action = 'purchase' AND item_id IS NOT NULL;
