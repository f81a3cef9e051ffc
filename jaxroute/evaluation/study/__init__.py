"""Many settings judged in one table: routers, rules and planners."""
